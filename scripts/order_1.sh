#!/usr/bin/env bash
# Order 1 on T5-large: dbpedia, amazon, yahoo, agnews.
#
#   Model     pip install huggingface_hub && hf download google-t5/t5-large --local-dir initial_model/t5-large
#   Launch    bash scripts/order_1.sh          (--tiny: a tiny T5 and made-up data, minutes on a CPU)
#   Override  SEED=1 EXTRA="--galore_rank 16 --lamda_2 0.1" bash scripts/order_1.sh
#             MODEL DATA_DIR METHOD NPROC DS_CONFIG SEED SAVE_STEPS OUTPUT EXTRA DRY_RUN: see order.sh
#
# The published settings of orders 1-3 are in settings_t5 of scripts/settings.sh.
exec bash "$(dirname "$0")/order.sh" order1 "$@"
