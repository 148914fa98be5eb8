#!/usr/bin/env bash
# Order 1 on LLaMA-2-7B: dbpedia, amazon, yahoo, agnews.
#
#   Model     pip install huggingface_hub && hf download meta-llama/Llama-2-7b-hf --local-dir initial_model/llama
#             (once `hf auth login` knows you and access is granted; any LLaMA will do)
#   Launch    NPROC=8 bash scripts_llama/order_1.sh     (published on 8 GPUs; any number keeps the 64 rows a step)
#             --small: SmolLM2-135M instead; --tiny: a tiny LLaMA and made-up data, minutes on a CPU
#   Override  EXTRA="--max_source_length 384" bash scripts_llama/order_1.sh     (less memory)
#             MODEL DATA_DIR METHOD NPROC DS_CONFIG SEED SAVE_STEPS OUTPUT EXTRA DRY_RUN: see order.sh
#
# The published settings are in settings_llama of scripts/settings.sh.
exec bash "$(dirname "$0")/order.sh" order1 "$@"
