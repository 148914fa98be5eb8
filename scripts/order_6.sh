#!/usr/bin/env bash
# Order 6 on T5-large: yelp, amazon, MNLI, CB, COPA, QQP, RTE, IMDB, SST-2, dbpedia, agnews, yahoo, MultiRC, BoolQA, WiC.
#
#   Model     pip install huggingface_hub && hf download google-t5/t5-large --local-dir initial_model/t5-large
#   Launch    bash scripts/order_6.sh          (--tiny: a tiny T5 and made-up data, minutes on a CPU)
#             NPROC=8 bash scripts/order_6.sh  (published on 8 GPUs; 1, 2 or 4 see the same 64 examples a step)
#   Override  SEED=1 EXTRA="--galore_rank 16 --lamda_2 0.1" bash scripts/order_6.sh
#             EXTRA="--preset released" computes what the authors' released code computes
#             MODEL DATA_DIR METHOD NPROC DS_CONFIG SEED SAVE_STEPS OUTPUT EXTRA DRY_RUN: see order.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh

# This order's values, as published. What all orders share is in settings_t5 of settings.sh.
# shellcheck disable=SC2034  # order.sh and run.sh read them
values=(
    --galore_rank 32 --galore_scale 0.25
    --galore_update_proj_gap 20  # the default of the released code, whose script passes none
    --per_device_eval_batch_size 128
    --task_epochs MNLI=2  # every other task trains for one epoch
)
# shellcheck disable=SC2034
penalties=(--lamda_1 0.5 --lamda_2 0.1 --lamda_3 0)  # only METHOD=gorp gets them

# Started directly, this script trains the order; sourced by order.sh or run.sh, it only sets its values.
[[ ${BASH_SOURCE[0]} != "$0" ]] || exec bash "$(dirname "$0")/order.sh" order6 "$@"
