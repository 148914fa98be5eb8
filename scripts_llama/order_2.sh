#!/usr/bin/env bash
# Order 2 on LLaMA-2-7B: dbpedia, amazon, agnews, yahoo.
#
#   Model     pip install huggingface_hub && hf download meta-llama/Llama-2-7b-hf --local-dir initial_model/llama
#             (after `hf auth login`, once access is granted; MODEL= takes any decoder-only model)
#   Launch    NPROC=8 bash scripts_llama/order_2.sh     (published on 8 GPUs; 1, 2 or 4 see the same 64 examples a step)
#             --small: SmolLM2-135M instead; --tiny: a tiny LLaMA and made-up data, minutes on a CPU
#   Override  EXTRA="--max_source_length 384" bash scripts_llama/order_2.sh     (less memory)
#             EXTRA="--preset released" computes what the authors' released code computes, in float32 on one GPU
#             MODEL DATA_DIR METHOD NPROC DS_CONFIG SEED SAVE_STEPS OUTPUT EXTRA DRY_RUN: see ../scripts/order.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh

# This order's values, as published. What all orders share is in settings_llama of ../scripts/settings.sh.
# shellcheck disable=SC2034  # order.sh and run_llama.sh read them
values=(
    --galore_rank 8 --galore_scale 0.25
    --galore_update_proj_gap 20  # the default of the released code, whose script passes none
    --per_device_eval_batch_size 4
)
# shellcheck disable=SC2034
penalties=(--lamda_1 0.5 --lamda_2 0 --lamda_3 0)  # only METHOD=gorp gets them

# Started directly, this script trains the order; sourced by order.sh or run_llama.sh, it only sets its values.
[[ ${BASH_SOURCE[0]} != "$0" ]] || exec bash "$(dirname "$0")/order.sh" order2 "$@"
