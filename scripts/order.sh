#!/usr/bin/env bash
# Train any order on T5-large: the tasks of configs/NAME_configs/, one after the other (new orders: data/make_order.py).
#
#   Launch    bash scripts/order.sh NAME          (--tiny: a tiny T5 and made-up data, minutes on a CPU)
#   Values    order1 to order6: those in order_1.sh to order_6.sh; any other order: those in order_1.sh
#   Resume    with the same command; --fresh instead moves earlier results aside and starts over
#   Override  with variables in front of the command; defaults are in parentheses:
#     MODEL=FOLDER     base model: a folder or a hub id    (initial_model/t5-large)
#     DATA_DIR=FOLDER  benchmark                           (CL_Benchmark; with --tiny data/mini_benchmark)
#     METHOD=NAME      method: a file name in src/methods  (gorp)
#     NPROC=N          processes, by DeepSpeed's launcher  (1, without the launcher)
#     NNODES=N NODE_RANK=I MASTER_ADDR=HOST, or HOSTFILE=FILE   several machines: docs/RUNNING.md
#     DS_CONFIG=FILE   DeepSpeed config                    (a stage 2 config if NPROC is above 1, otherwise none)
#     SEED=N           random seed                         (42)
#     SAVE_STEPS=N     a checkpoint every N steps, to resume within a task   (none: an unfinished task starts over)
#     OUTPUT=FOLDER    results in FOLDER/NAME/, log in FOLDER/NAME.log
#                      (logs_and_outputs/NAME/, logs/NAME.log, where another mode, method, preset or seed is
#                      appended to NAME: order_1-tiny, order_1-olora, order_1-tiny-sgorp-seed1)
#     GORP_ENV=active  run in the active environment if its packages are new enough   (.venv, with exact versions)
#     EXTRA="..."      more flags of src/run_uie_lora.py or src/run_order.py, quoted as in a shell; they override the
#                      script's:
#                      "--preset released" computes what the authors' released code computes (METHOD=gorp, NPROC=1),
#                      "--task_epochs DATASET=N ..." trains these tasks for N epochs
#     DRY_RUN=1        only print the command
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/lib.sh"
parse_arguments "bash scripts/order.sh [--tiny] [--fresh] NAME" "$@"
[ ${#names[@]} -eq 1 ] || fail "expected one order, found ${#names[@]}; $usage"
run_order t5 "${names[0]}"
