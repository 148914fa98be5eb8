#!/usr/bin/env bash
# Train the published orders on LLaMA-2-7B, one after the other.
#
#   Model     pip install huggingface_hub && hf download meta-llama/Llama-2-7b-hf --local-dir initial_model/llama
#   Launch    NPROC=8 bash scripts_llama/run_llama.sh     (orders 1-3, as published on 8 GPUs)
#             bash scripts_llama/run_llama.sh --small 1   (SmolLM2-135M instead)
#             bash scripts_llama/run_llama.sh --tiny 1    (a tiny LLaMA and made-up data, minutes on a CPU)
#   Override  SEED=1 bash scripts_llama/run_llama.sh      (all variables: scripts/order.sh)
#   Values    each order's own in order_1.sh to order_3.sh, what they share in scripts/settings.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/../scripts/lib.sh"
parse_arguments "bash scripts_llama/run_llama.sh [--tiny|--small] [--fresh] [ORDER ...], ORDER 1 to 3" "$@"
run_published llama 3
