# shellcheck shell=bash
# Shell functions shared by scripts/ and scripts_llama/: set-up, arguments, checks, and running an order.
# Settings that the orders of a model family share are in settings.sh, an order's own values in order_K.sh. Paths are
# relative to the repository's root.
#
# While a task runs, the terminal shows progress bars, and lines that begin with `[gorp] ` or `error: `. The log has
# everything (see terminal.py).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/settings.sh

say() { echo "[gorp] $*"; }
fail() { echo "error: $*" >&2; exit 2; }

# --- set-up ---

# Set PYTHON to an interpreter whose environment has exactly the packages of the requirements files, and put its folder
# first on PATH. If neither the active environment nor .venv has them, .venv is created or updated.
set_up() {  # REQUIREMENTS_FILE ...
    find_environment "$@" && return
    say "setting up .venv from $* (once; some minutes)"
    { is_new_enough .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null; } || make_venv
    install "$@"
    find_environment "$@" && return
    make_venv   # pip considers a package installed even if its installation was interrupted near its end
    install "$@"
    find_environment "$@" || fail ".venv: does not have the packages of $*"
}

find_environment() {  # REQUIREMENTS_FILE ...
    local candidate
    for candidate in "${VIRTUAL_ENV:-.venv}/bin/python" .venv/bin/python python python3; do
        if PYTHON=$("$candidate" scripts/satisfied.py "$@" 2>/dev/null); then
            export PATH="${PYTHON%/*}:$PATH"
            return 0
        fi
    done
    return 1
}

make_venv() {
    find_python
    "$PYTHON" -m venv --clear .venv || fail ".venv: $PYTHON could not create it; the reason is above"
}

install() {  # REQUIREMENTS_FILE ...
    local file files=()
    for file; do files+=(-r "$file"); done
    .venv/bin/python -m pip install "${files[@]}" || fail ".venv: pip could not install $*; the reason is above"
}

# Set PYTHON to any Python that is new enough.
find_python() {
    for PYTHON in python3.11 python3.12 python3 python; do
        ! is_new_enough "$PYTHON" || return 0
    done
    fail "Python: found no version 3.11 or newer on PATH; install one, with its venv and pip modules"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Whether PyTorch finds a GPU. It is asked, which takes seconds, only where the system has a device for one.
has_gpu() {
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]] || return 1
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# --- arguments and checks ---

# Parse a script's arguments into `mode` (full, small or tiny), `fresh` and `names`; keep its usage line in `usage`.
parse_arguments() {  # USAGE ARGUMENT ...
    local argument
    usage="usage: $1" mode=full fresh='' names=()
    shift
    for argument; do
        case "$argument" in
            -h | --help) echo "$usage"; exit 0 ;;
            --tiny) mode=tiny ;;
            --fresh) fresh=yes ;;
            --small) [[ $usage == *--small* ]] || fail "--small: not available here; $usage"; mode=small ;;
            -*) fail "$argument: no such flag; $usage" ;;
            *) names+=("$argument") ;;
        esac
    done
}

# What needs no Python is checked before anything is installed.
check_settings() {
    [[ $name =~ ^[A-Za-z0-9_.-]+$ && $name != ds && -d configs/${name}_configs ]] ||
        fail "order '$name': no folder configs/${name}_configs; data/make_order.py makes one"
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$ranks: a number of processes, 1 or more"
    [[ ${SAVE_STEPS:-1} =~ ^[1-9][0-9]*$ ]] || fail "SAVE_STEPS=$SAVE_STEPS: a number of optimizer steps, 1 or more"
    [[ -z ${DS_CONFIG:-} || -f $DS_CONFIG ]] || fail "DS_CONFIG=$DS_CONFIG: no such file"
    [[ -z ${DATA_DIR:-} || -d $DATA_DIR ]] || fail "DATA_DIR=$DATA_DIR: no such folder"
    [[ $preset != released || ($ranks -eq 1 && -z ${DS_CONFIG:-}) ]] ||
        fail "--preset released: found with NPROC=$ranks${DS_CONFIG:+ and DS_CONFIG=$DS_CONFIG}; one process without" \
             "DeepSpeed is allowed"
}

check_model() {
    [[ $mode != full || -n ${MODEL:-} || -f $model/config.json ]] || fail "$model: contains no model. Two options:
  the published one:  pip install huggingface_hub && hf download $source --local-dir $model
                      (any other: MODEL=FOLDER_OR_HUB_ID in front of the same command)
  a small one, on a CPU:  the same command with $small_flags"
}

# --- running orders ---

# Run the published orders that `names` lists by number, or all of them, each with its script's values.
run_published() {  # FAMILY LAST_ORDER
    local number
    # shellcheck disable=SC2207  # numbers hold no blanks
    [ ${#names[@]} -gt 0 ] || names=($(seq "$2"))
    for number in "${names[@]}"; do
        [[ $number =~ ^[1-$2]$ ]] || fail "order '$number': $usage"
    done
    for number in "${names[@]}"; do
        run_order "$1" "order$number"
    done
}

# Check configs/NAME_configs, then train its tasks one after the other by src/run_order.py, in one process (or one for
# each rank). DRY_RUN=1 only prints the command.
run_order() {  # FAMILY NAME
    local name=$2 label=$2 ranks=${NPROC:-1} started=$SECONDS extra method preset
    local scripts model source small_flags outputs logs deepspeed_config batch rows released_precision=''
    local shared changed=() changed_penalties=() memory_options=() gpu_options=() values penalties values_from
    read -ra extra -d '' <<< "${EXTRA:-}" || true   # words only: nothing in EXTRA is expanded or run
    method=$(in_extra --method "${METHOD:-gorp}") preset=$(in_extra --preset default)
    "settings_$1" "$name" "$mode"
    check_settings
    read_values
    local data=${DATA_DIR:-CL_Benchmark}
    [[ -n ${DATA_DIR:-} ]] || has_examples || data=data/mini_benchmark
    local order_dir=${OUTPUT:-$outputs}/$label log=${OUTPUT:-$logs}/$label.log accumulation options command

    if [ -n "${DRY_RUN:-}" ]; then
        find_environment requirements.txt || find_python
        set_command
        describe >&2
        printf '%q ' "${command[@]}" && echo
    else
        check_model
        set_up requirements.txt
        make_small_parts
        set_command
        trap 'say "$name: interrupted; the same command resumes" >&2; exit 130' INT
        run_tasks
        "$PYTHON" src/report "$order_dir" 2>&1 | "$PYTHON" scripts/terminal.py --all "$log"
        trap - INT
        say "$name took $((SECONDS - started)) s; results in $order_dir, log in $log"
    fi
}

# Whether the mode finds examples in CL_Benchmark; a small model does without them.
has_examples() {
    [[ $mode == full ]] || { [[ $mode == small ]] && compgen -G 'CL_Benchmark/*/*/train.json' >/dev/null; }
}

# The value of a flag in EXTRA; the last one counts.
in_extra() {  # FLAG DEFAULT
    local value=$2 index
    for index in "${!extra[@]}"; do
        case ${extra[index]} in
            "$1") value=${extra[index + 1]:-} ;;
            "$1="*) value=${extra[index]#*=} ;;
        esac
    done
    printf '%s' "$value"
}

# Read an order's own `values` and `penalties`, and its `label` in paths. Unpublished orders use order 1's values.
read_values() {
    local script=$scripts/order_1.sh
    if [[ $name =~ ^order([0-9]+)$ ]]; then
        label=order_${BASH_REMATCH[1]}
        [ ! -f "$scripts/$label.sh" ] || script=$scripts/$label.sh
    fi
    # shellcheck source=scripts/order_1.sh
    source "$script"
    values_from=$script
}

# Create the data and model of small runs if they are missing.
make_small_parts() {
    if [[ $data == data/mini_benchmark && ! -d $data ]]; then "$PYTHON" data/mini_benchmark.py; fi
    if [[ $mode == small && -z ${MODEL:-} && ! -d $model ]]; then "$PYTHON" initial_model/unpack_small.py smollm2; fi
}

# Set `command`, which runs the order. A later flag overrides an earlier one: those for a small model follow the
# published ones, and EXTRA follows all.
set_command() {
    local launch=("$PYTHON")
    options=("${shared[@]}" "${values[@]}")
    # Other methods have their own defaults for penalties, and the released code computes none.
    [[ $method != gorp || $preset == released ]] || options+=("${penalties[@]}" "${changed_penalties[@]}")
    options+=("${changed[@]}")
    if [ "$preset" != released ]; then
        options+=("${memory_options[@]}")
        [ ${#gpu_options[@]} -eq 0 ] || ! has_gpu || options+=("${gpu_options[@]}")
    fi
    # An optimizer step sees `rows` examples on any number of ranks that divides it.
    [ $((batch * ranks)) -le "$rows" ] || batch=$((rows > ranks ? rows / ranks : 1))
    accumulation=$((rows / (batch * ranks)))
    [ "$accumulation" -ge 1 ] || accumulation=1
    options+=(--per_device_train_batch_size "$batch" --gradient_accumulation_steps "$accumulation")
    if [[ $ranks -gt 1 || -n ${DS_CONFIG:-} ]]; then
        launch=(deepspeed --num_accelerators "$ranks" --master_port "$(free_port)")
        options+=(--deepspeed "${DS_CONFIG:-$deepspeed_config}")
        has_gpu || options+=(--use_cpu True)   # needed by ranks on a CPU to connect
    fi
    [ -z "${SAVE_STEPS:-}" ] ||
        options+=(--save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 2 --drop_checkpoints)
    [ -z "$fresh" ] || options+=(--fresh "$log")
    command=(
        "${launch[@]}" src/run_order.py "configs/${name}_configs" --model_name_or_path "${MODEL:-$model}"
        --data_dir "$data" --output_dir "$order_dir/outputs" --method "${METHOD:-gorp}" --seed "${SEED:-42}"
        "${options[@]}" "${extra[@]}"
    )
}

# Describe the command: the method, the source of its values, the examples per step, the precision.
describe() {
    local what from penalties_of='' size=$((batch * accumulation * ranks)) step precision=float32
    case $method/$preset in
        gorp/default) what='gorp, the published method' ;;
        gorp/released) what='gorp as its released code computes it (--preset released)' ;;
        sgorp/default) what="sgorp, this project's variant of gorp" ;;
        *) what=$(printf '%q, not the published method' "$method") ;;
    esac
    [ "$method" = gorp ] || penalties_of=', but its own defaults for penalties'
    case $mode/$values_from in
        full/*/"$label.sh") from='the published values' ;;
        full/*) from="the published values of $values_from" ;;
        *) from='values for a small model (settings.sh)' ;;
    esac
    step="$size examples a step = $batch x $(counted "$accumulation" micro-batch es) on $(counted "$ranks" process es)"
    [ $size -eq "$rows" ] || step+=" ($rows would need a number of processes that divides it)"
    say "$name: $what, with $from$penalties_of; $step"
    [[ $mode/$data != small/data/mini_benchmark ]] ||
        say "$name: CL_Benchmark has no train.json, so the made-up texts of data/mini_benchmark are used"
    if [ -n "$released_precision" ]; then
        [[ " ${options[*]} " != *' --bf16 True '* ]] || precision=bf16
        if [ "$preset" = released ]; then
            say "$name: $released_precision, as in the released runs"
        else
            say "$name: $precision with recomputation of activations, to save memory; the released runs were" \
                "$released_precision"
        fi
    fi
    [ ${#extra[@]} -eq 0 ] || say "$name: flags in EXTRA override these:$(printf ' %q' "${extra[@]}")"
}

counted() { if [ "$1" -eq 1 ]; then echo "1 $2"; else echo "$1 $2$3"; fi; }  # NUMBER NOUN PLURAL_ENDING

# Run the command with a log, and check that all tasks are finished.
run_tasks() {
    local status=0 tasks finished
    export TOKENIZERS_PARALLELISM=false
    [ "$mode" = full ] || export HF_HUB_OFFLINE=1
    # On a busy machine, threads that wait for one another made a tiny task of one minute take five.
    [ "$mode" != tiny ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    {
        printf '%q ' "${command[@]}" && echo
        describe
        say "checking $name: data, flags and model"
        exec "${command[@]}"
    } 2>&1 | "$PYTHON" scripts/terminal.py "$log" || status=$?
    shopt -s nullglob
    tasks=("configs/${name}_configs"/*/) finished=("$order_dir"/outputs/*/completed.json)
    shopt -u nullglob
    # The deepspeed launcher returns 0 when a signal ended it.
    [[ $status -ne 0 || ${#finished[@]} -ge ${#tasks[@]} ]] || status=1
    case $status in
        0) ;;
        2) exit 2 ;;   # bad input, which one line has explained
        *) echo "error: $name stopped with exit code $status$(signal_of $status) in task $((${#finished[@]} + 1)) of" \
               "${#tasks[@]}; its log: $log" >&2
           exit $status ;;
    esac
}

# The signal that ended a process with this exit code, if any: 128 + n in a shell, 256 - n from the launcher.
signal_of() {  # EXIT_CODE
    local number=$(($1 > 192 ? 256 - $1 : $1 - 128))
    [ $number -lt 1 ] || echo " (a process was ended by SIG$(kill -l "$number" 2>/dev/null || echo "NAL $number"))"
}
