# shellcheck shell=bash disable=SC2034
# Settings that all orders of a model family share; an order's own are in its script, order_K.sh. `full` is the
# published run; `--small` and `--tiny` change what a small model needs.
#
# A settings function gets ORDER and MODE (full, small or tiny) and sets
#   scripts             the folder of the orders' scripts
#   model               the base model's folder, unless MODEL is set
#   source              the hub id of that model
#   small_flags         flags that run without that model
#   outputs, logs       where results and logs go
#   deepspeed_config    for several ranks, unless DS_CONFIG is set
#   batch, rows         examples per device and micro-batch, and per optimizer step over all ranks
#   shared              flags of src/run_order.py; the order's values follow them
#   changed             flags of a small model that override published ones; EXTRA comes last
#   changed_penalties   the same for penalty weights, which only `METHOD=gorp` gets
#   memory_options      flags that save memory; on a GPU also gpu_options; neither with --preset released
#   released_precision  what the released runs used instead, to be reported when a run starts

published_rows=64  # on 8 GPUs, each with 2 micro-batches of 4 (T5) or 8 micro-batches of 1 (LLaMA)

common=(
    --do_train --do_predict --predict_with_generate
    --instruction_file configs/instruction_config.json --instruction_strategy single
    --add_task_name True --add_dataset_name True
    --max_source_length 512 --max_target_length 50
    --num_train_epochs 1 --lr_scheduler_type constant --warmup_steps 0
    --galore_proj_type std  # the default of the released code, whose scripts pass none
    --logging_strategy steps --logging_steps 10 --eval_strategy no --save_strategy no
)

# The tiny models: the same number of steps for every task, without lamda_2 and lamda_3. Steps, batch and learning rate
# were chosen for T5 on dev examples of the mini benchmark by how well seqlora and multitask learn each task of order 1
# (80 % or more), regardless of how much is forgotten later.
tiny=(
    --max_steps 150 --learning_rate 3e-3 --galore_lr 3e-3 --galore_rank 16 --galore_scale 1 --lr_scheduler_type cosine
    --lora_dropout 0 --per_device_eval_batch_size 64
)
tiny_penalties=(--lamda_2 0 --lamda_3 0)

# Set `modules`, where the methods train: the published regular expressions, or for another model what suits its type.
where_to_train() {  # FAMILY LORA_MODULES OPTIM_TARGET_MODULES PROJ_LORA_MODULES
    modules=(--lora_modules "$2" --optim_target_modules "$3" --proj_lora_modules "$4")
    [ -z "${MODEL:-}" ] ||
        modules=(--family "$1" --lora_modules auto --optim_target_modules auto --proj_lora_modules auto)
}

# T5-large.
settings_t5() {
    scripts=scripts outputs=logs_and_outputs logs=logs
    model=initial_model/t5-large source=google-t5/t5-large small_flags=--tiny
    deepspeed_config=configs/ds_configs/stage2.config
    batch=4 rows=$published_rows
    local modules
    where_to_train encoder-decoder '.*SelfAttention.(q|v).*' '.*EncDecAttention.(q|v).*' \
        '.*SelfAttention.(q|v).loranew_A.*'
    shared=(
        "${common[@]}" "${modules[@]}"
        --learning_rate 1e-3 --galore_lr 1e-5
    )
    if [ "$2" = tiny ]; then
        model=initial_model/tiny-t5 batch=16 rows=16
        changed=("${tiny[@]}") changed_penalties=("${tiny_penalties[@]}")
        case $1 in order[456]) changed+=(--max_steps 100) ;; esac
    fi
}

# LLaMA-2-7B.
settings_llama() {
    scripts=scripts_llama outputs=logs_and_outputs_llama logs=logs_llama
    model=initial_model/llama source=meta-llama/Llama-2-7b-hf small_flags='--tiny, or --small for SmolLM2-135M'
    deepspeed_config=configs/ds_configs/stage2_llama.config
    batch=1 rows=$published_rows gpu_options=(--bf16 True)
    local modules
    where_to_train decoder-only '.*self_attn.(q_proj|v_proj).*' '.*mlp.gate_proj.*' \
        '.*self_attn.(q_proj|v_proj).loranew_A.*'
    shared=(
        "${common[@]}" "${modules[@]}"
        --learning_rate 2e-4 --galore_lr 1e-6
    )
    case $2 in
        full)
            memory_options=(--gradient_checkpointing True)  # the name that every supported version of transformers knows
            released_precision='float32 without recomputation (27 GB of weights)' ;;
        small)
            model=initial_model/smollm2-135m batch=4 rows=4
            changed=(--learning_rate 1e-3 --galore_lr 1e-5 --galore_scale 1 --per_device_eval_batch_size 16) ;;
        tiny)
            model=initial_model/tiny-llama batch=4 rows=4 gpu_options=()
            changed=("${tiny[@]}" --max_steps 900) changed_penalties=("${tiny_penalties[@]}") ;;
    esac
}
