#!/usr/bin/env bash
# Train any order on LLaMA-2-7B: the tasks of configs/NAME_configs/, one after the other (new ones: data/make_order.py).
#
#   Launch    bash scripts_llama/order.sh NAME
#             --small: SmolLM2-135M instead; --tiny: a tiny LLaMA and made-up data, minutes on a CPU
#   Values    order1 to order3: those in order_1.sh to order_3.sh; any other order: those in order_1.sh
#   Override  with variables in front of the command, as in scripts/order.sh; here the defaults are
#             MODEL=initial_model/llama, results in logs_and_outputs_llama/NAME/, log in logs_llama/NAME.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/../scripts/lib.sh"
parse_arguments "bash scripts_llama/order.sh [--tiny|--small] [--fresh] NAME" "$@"
[ ${#names[@]} -eq 1 ] || fail "expected one order, found ${#names[@]}; $usage"
run_order llama "${names[0]}"
