# shellcheck shell=bash disable=SC2034
# The settings of every family of runs, each in one place. `full` is the published run; `--small` and `--tiny` change
# what a small model needs. A later flag wins over an earlier one: small values follow the published ones, EXTRA both.
#
# A settings function gets ORDER and MODE (full, small or tiny) and sets
#   model               the base model's folder, unless MODEL says another
#   source              where a missing one comes from, on the hub
#   small_flags         what runs without it
#   outputs, logs       where results and logs go
#   deepspeed_config    for several ranks, unless DS_CONFIG says another
#   batch, rows         rows a device takes at once, and rows an optimizer step sees over all ranks
#   options             the flags of src/run_order.py that are those of src/run_uie_lora.py
#   gpu_options         flags on a machine with a GPU only
#
# lamda_1 is left to the method: 0.5 for O-LoRA, 0 for GORP, whose published scripts pass 0.5 to code that leaves it out.

common=(
    --do_train --do_predict --predict_with_generate
    --instruction_file configs/instruction_config.json --instruction_strategy single
    --add_task_name True --add_dataset_name True
    --max_source_length 512 --max_target_length 50 --generation_max_length 50
    --num_train_epochs 1 --lr_scheduler_type constant --warmup_steps 0
    --logging_strategy steps --logging_steps 10 --eval_strategy no --save_strategy no
)

# The tiny models: equal steps for every task, without lamda_2 and lamda_3. LLaMA, which takes more of a step's time and
# fewer steps to learn, and the orders of 15 tasks get fewer, so that they take minutes.
tiny=(
    --max_steps 1200 --learning_rate 3e-3 --galore_lr 3e-3 --galore_rank 16 --galore_scale 1 --lr_scheduler_type cosine
    --lora_dropout 0 --lamda_2 0 --lamda_3 0 --per_device_eval_batch_size 64
)

# T5-large. Orders 4-6 have 15 tasks and settings of their own; orders of your own take those of orders 1-3.
# Not published for orders 4-6: galore_update_proj_gap. For none: galore_proj_type.
settings_t5() {
    model=initial_model/t5-large source=google-t5/t5-large small_flags=--tiny
    outputs=logs_and_outputs logs=logs deepspeed_config=configs/ds_configs/stage2.config
    batch=4 rows=8 gpu_options=()
    options=(
        "${common[@]}"
        --lora_modules '.*SelfAttention.(q|v).*'
        --optim_target_modules '.*EncDecAttention.(q|v).*'
        --proj_lora_modules '.*SelfAttention.(q|v).loranew_A.*'
        --learning_rate 1e-3 --galore_lr 1e-5 --galore_update_proj_gap 10 --galore_proj_type std
    )
    case $1 in
        order[456]) options+=(--galore_rank 32 --galore_scale 0.25 --lamda_2 0.1 --lamda_3 0
                              --per_device_eval_batch_size 128) ;;
        *) options+=(--galore_rank 8 --galore_scale 1 --lamda_2 0 --lamda_3 0.05 --per_device_eval_batch_size 64) ;;
    esac
    if [ "$2" = tiny ]; then
        model=initial_model/tiny-t5 batch=4 rows=4
        options+=("${tiny[@]}")
        case $1 in order[456]) options+=(--max_steps 200) ;; esac
    fi
}

# LLaMA-2-7B. Not published: galore_update_proj_gap, galore_proj_type. Published on 8 GPUs, 1 row x 8 micro-batches each.
settings_llama() {
    model=initial_model/llama source=meta-llama/Llama-2-7b-hf
    small_flags='--tiny, or --small for SmolLM2-135M'
    outputs=logs_and_outputs_llama logs=logs_llama deepspeed_config=configs/ds_configs/stage2_llama.config
    batch=1 rows=64 gpu_options=(--bf16 True)
    options=(
        "${common[@]}"
        --lora_modules '.*self_attn.(q_proj|v_proj).*'
        --optim_target_modules '.*mlp.gate_proj.*'
        --proj_lora_modules '.*self_attn.(q_proj|v_proj).loranew_A.*'
        --learning_rate 2e-4 --galore_lr 1e-6 --galore_update_proj_gap 10 --galore_proj_type std
        --galore_rank 8 --galore_scale 0.25 --lamda_2 0 --lamda_3 0
        --per_device_eval_batch_size 4
    )
    case $2 in
        full) options+=(--activation_checkpointing True) ;;  # gradient checkpointing, as transformers calls it now
        small)
            model=initial_model/smollm2-135m batch=4 rows=4
            options+=(--learning_rate 1e-3 --galore_lr 1e-5 --galore_scale 1 --per_device_eval_batch_size 16) ;;
        tiny)
            model=initial_model/tiny-llama batch=4 rows=4 gpu_options=()
            options+=("${tiny[@]}" --max_steps 900) ;;
    esac
}
