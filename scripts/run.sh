#!/usr/bin/env bash
# Train the published orders on T5-large, one after the other.
#
#   Model     pip install huggingface_hub && hf download google-t5/t5-large --local-dir initial_model/t5-large
#   Launch    bash scripts/run.sh             (orders 1-6)
#             bash scripts/run.sh 1 4         (some of them)
#             bash scripts/run.sh --tiny 1    (a tiny T5 and made-up data, minutes on a CPU)
#   Override  SEED=1 bash scripts/run.sh      (all variables: scripts/order.sh)
#   Values    each order's own in order_1.sh to order_6.sh, what they share in settings.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/lib.sh"
parse_arguments "bash scripts/run.sh [--tiny] [--fresh] [ORDER ...], ORDER 1 to 6" "$@"
run_published t5 6
