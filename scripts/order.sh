#!/usr/bin/env bash
# Any order on T5-large: trains the tasks of configs/NAME_configs/ one after the other (data/make_order.py makes one).
#
#   Launch    bash scripts/order.sh NAME          (--tiny: a tiny T5 and made-up data, minutes on a CPU)
#   Values    order1 to order6: those in order_1.sh to order_6.sh; any other order: those in order_1.sh
#   Again     the same command resumes; --fresh moves earlier results aside and starts over
#   Override  by variables in front of the command:
#     MODEL=FOLDER     base model: a folder or a hub id    (initial_model/t5-large)
#     DATA_DIR=FOLDER  benchmark                           (CL_Benchmark; with --tiny data/mini_benchmark)
#     METHOD=NAME      a file name of src/methods          (gorp)
#     NPROC=N          processes, by DeepSpeed's launcher  (1, without the launcher)
#     NNODES=N NODE_RANK=I MASTER_ADDR=HOST, or HOSTFILE=FILE   several machines: docs/RUNNING.md
#     DS_CONFIG=FILE   DeepSpeed config                    (one of stage 2 where NPROC is above 1, else none)
#     SEED=N           random seed                         (42)
#     SAVE_STEPS=N     a checkpoint every N steps, to resume within a task   (none: an unfinished task starts over)
#     OUTPUT=FOLDER    results in FOLDER/NAME/, log in FOLDER/NAME.log
#                      (logs_and_outputs/NAME/, logs/NAME.log, where NAME has what distinguishes the run from the plain
#                      published one: order_1-tiny, order_1-olora, order_1-tiny-sgorp-seed1)
#     GORP_ENV=active  run in the active environment if its packages are new enough   (.venv, with exact versions)
#     EXTRA="..."      more flags of src/run_uie_lora.py or src/run_order.py, quoted as in a shell; they override the
#                      script's:
#                      "--preset released" computes what the authors' released code computes (METHOD=gorp, NPROC=1),
#                      "--task_epochs DATASET=N ..." trains these tasks N times
#     DRY_RUN=1        only print the command
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/lib.sh"
parse_arguments "bash scripts/order.sh [--tiny] [--fresh] NAME" "$@"
[ ${#names[@]} -eq 1 ] || fail "${#names[@]} orders found; one is allowed: $usage"
run_order t5 "${names[0]}"
