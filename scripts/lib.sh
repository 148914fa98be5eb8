# shellcheck shell=bash
# Shell functions shared by scripts/ and scripts_llama/: set-up, arguments, checks, and running an order.
# Settings that the orders of a model family share are in settings.sh, an order's own values in order_K.sh. Paths
# below are relative to the repository's root.
#
# While a task runs, the terminal shows progress bars and lines that begin with `[gorp] ` or `error: `. The log has
# everything (see terminal.py).

set -euo pipefail
[[ ${BASH_VERSINFO[0]}${BASH_VERSINFO[1]} -ge 44 ]] ||
    { echo "error: bash $BASH_VERSION; allowed: 4.4 or newer (macOS: brew install bash)" >&2; exit 2; }
gpu='' gpus=''   # what has_gpu found, and the number of GPUs; not the user's variables of these names
use_gpu='import sys, torch
if not torch.cuda.is_available(): sys.exit(1 if torch.version.cuda or torch.version.hip else "it is a build for CPUs")
try: torch.ones(1, device="cuda") + 1   # fails where this PyTorch has no code for the GPU
except RuntimeError as error: sys.exit(str(error).splitlines()[0])
print(torch.cuda.device_count())'
script=$0   # made absolute, as the current folder changes below
[[ $script == /* ]] || script=$PWD/$script
[ -n "${HOME:-}" ] || HOME=~
for variable in OUTPUT MODEL DATA_DIR DS_CONFIG HOSTFILE; do   # if run elsewhere, make OUTPUT and found paths absolute
    [[ ${!variable:-} != "~/"* ]] || printf -v $variable %s "$HOME/${!variable#"~/"}"   # quoted, the shell left it
    [[ -z ${!variable:-} || ${!variable} == /* ]] || [[ $variable != OUTPUT && ! -e ${!variable} ]] ||
        [ "$PWD" -ef "$(dirname "${BASH_SOURCE[0]}")/.." ] || printf -v $variable %s "$PWD/${!variable}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/settings.sh

say() { (trap '' PIPE; echo "[gorp] $*") 2>/dev/null || true; }   # a lost terminal or a full disk stops no run
fail() { echo "error: $*" >&2; exit 2; }
# As terminal.py masks what a run prints.
masked() { sed -E -e 's/(--hub[_-]token[= ])[^ )]+/\1***/g' -e 's/\bhf_[A-Za-z0-9]{20,}/hf_***/g'; }

# --- set-up ---

# Set PYTHON to an interpreter with the packages of the requirements files, and put its folder first on PATH: the active
# environment or .venv if it has the exact versions of requirements.lock, otherwise a .venv that is created or updated.
# With GORP_ENV=active it is the active environment, which only has to meet the requirements files' lower bounds.
set_up() {  # REQUIREMENTS_FILE ...
    local differences
    if [ -n "${GORP_ENV:-}" ]; then
        compare "$(command -v python || echo python3)" "$@" || [ $? -eq 3 ] ||
            fail "GORP_ENV=active: $PYTHON has $differences"
        use "$PYTHON"
        [ -z "$differences" ] || say "GORP_ENV=active: $PYTHON is used as it is, with $differences"
        return
    fi
    ! find_environment "$@" || return 0
    if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
        local status=0
        compare python "$@" || status=$?
        case $status in
            3) say "the active environment has $differences; GORP_ENV=active uses it nevertheless" ;;
            4) say "the active environment has $differences, so .venv is used" ;;
        esac
    fi
    say "setting up .venv from $* (once; some minutes)"
    .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && is_ours || make_venv
    install "$@"
    find_environment "$@" && return
    [ -z "${PYTHONPATH:-}" ] || ! (unset PYTHONPATH; compare .venv/bin/python "$@") ||
        fail "PYTHONPATH=$PYTHONPATH: hides packages of .venv; unset it"
    make_venv   # pip considers a package installed even if its installation was interrupted near its end
    install "$@"
    find_environment "$@" || { compare .venv/bin/python "$@" || fail ".venv: after pip installed $*: $differences"; }
}

# Compare an interpreter with the requirements files; set PYTHON to its path and `differences` to what it lacks.
compare() {  # INTERPRETER REQUIREMENTS_FILE ...
    local status=0 said
    said=$("$1" scripts/satisfied.py "${@:2}" 2>/dev/null) || status=$?
    PYTHON=${said%%$'\n'*} differences=${said#"$PYTHON"}
    differences=${differences#$'\n'}
    [ -n "$said" ] || PYTHON=$1 differences='no usable Python'
    return $status
}

use() { PYTHON=$1 PATH="${1%/*}:$PATH"; export PATH; }  # INTERPRETER

find_environment() {  # REQUIREMENTS_FILE ...
    local candidate differences
    for candidate in "${VIRTUAL_ENV:-.venv}/bin/python" .venv/bin/python python python3; do
        ! compare "$candidate" "$@" || { use "$PYTHON"; return 0; }
    done
    return 1
}

# Whether these scripts made .venv, and so may change it: they use --clear, which Python records in pyvenv.cfg.
is_ours() { [ ! -L .venv ] && grep -qs '^command = .* -m venv --clear ' .venv/pyvenv.cfg; }

make_venv() {
    [[ ! -e .venv && ! -L .venv ]] || is_ours || fail ".venv: lacks packages of the requirements files and was not" \
        "made by these scripts, which leave it alone; move it away, or activate it and set GORP_ENV=active"
    find_python
    "$PYTHON" -m venv --clear .venv || fail ".venv: $PYTHON could not create it; the reason is above"
}

install() {  # REQUIREMENTS_FILE ...
    local file files=() output
    for file; do files+=(-r "$file"); done
    output=$(.venv/bin/python -m pip install "${files[@]}" -c requirements.lock 2>&1) ||
        { echo "$output" >&2; fail ".venv: pip could not install $*; the reason is above"; }
}

# Set PYTHON to any Python that is new enough.
find_python() {
    for PYTHON in python3.11 python3.12 python3.13 python3 python; do
        ! "$PYTHON" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 0
    done
    fail "Python: found no version 3.11 or newer with the modules venv and ensurepip on PATH (on Debian and Ubuntu" \
        "they are the package python3-venv)"
}

# Whether PyTorch finds a GPU. Asking it takes seconds, so it is asked once, and only if the system has a GPU device.
# If PyTorch cannot use that device, its reason is shown.
has_gpu() {
    local reason
    if [ -z "${gpu:-}" ]; then
        gpu=no
        compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]] || return 1
        [[ ! ${CUDA_VISIBLE_DEVICES-unset} =~ ^(-1|NoDevFiles|)$ ]] || return 1
        if [ -n "${DRY_RUN:-}" ] && ! "$PYTHON" -c 'import torch' 2>/dev/null; then
            gpu=yes   # nothing is installed yet that could be asked
        elif reason=$("$PYTHON" -W always -c "$use_gpu" 2>&1); then
            gpu=yes gpus=${reason##*$'\n'}
            [[ $gpus =~ ^[0-9]+$ ]] || gpus=''
        else
            reason="PyTorch cannot use this machine's GPU: ${reason:-no reason given}"
            [ "${mode:-}" != full ] || fail "$reason; set CUDA_VISIBLE_DEVICES= to train on the CPU"
            say "$reason; training uses the CPU" >&2
        fi
    fi
    [ $gpu = yes ]
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
            -h | --help) echo "$usage"; print_head; exit 0 ;;
            --tiny) mode=tiny ;;
            --fresh) fresh=yes ;;
            --small) [[ $usage == *--small* ]] || fail "--small: not available here; $usage"; mode=small ;;
            -*) fail "$argument: no such flag; $usage" ;;
            *) names+=("$argument") ;;
        esac
    done
}

# Print the comment at the head of the running script, which is its help.
print_head() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"; }

variables=(MODEL DATA_DIR METHOD NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE DS_CONFIG SEED SAVE_STEPS
           OUTPUT EXTRA DRY_RUN GORP_ENV)

# Reject a variable that differs from one of ours by one letter or in case: METOD=olora would run gorp.
check_variables() {
    local found known i
    for found in $(compgen -e); do
        [[ " MODE ${variables[*]} " != *" $found "* ]] || continue   # containers often set MODE
        for known in "${variables[@]}"; do
            [[ ${found^^} != "$known" ]] || fail "$found: unknown variable; did you mean $known? Otherwise unset $found"
            for ((i = 1; i <= ${#known}; i++)); do
                if [[ $found == "${known:0:i+1}"?"${known:i+1}" || $found == "${known:0:i}${known:i+1}" ||
                      $found == "${known:0:i}"?"${known:i+1}" ||
                      $found == "${known:0:i}${known:i+1:1}${known:i:1}${known:i+2}" ]]; then
                    fail "$found: unknown variable; did you mean $known? Otherwise unset $found"
                fi
            done
        done
    done
}

# Set `extra` to the words of EXTRA, quoted as in a shell; nothing in it is expanded or run.
read_extra() {
    local words
    words=$(printf '%s .' "${EXTRA:-}" | xargs printf '%s\n' 2>/dev/null) ||
        fail "EXTRA=${EXTRA:-}: a quotation is not closed, or holds an escaped quotation mark or a line break"
    mapfile -t extra <<< "$words"
    unset 'extra[-1]'   # the dot; without it, xargs would print one empty word for an empty EXTRA
    local index name
    for index in "${!extra[@]}"; do   # Hugging Face's parser also takes --galore-rank
        [[ ${extra[index]} == --* ]] || continue
        name=${extra[index]%%=*}
        extra[index]=--$(tr - _ <<< "${name#--}")${extra[index]#"$name"}
    done
}

uses_deepspeed() { [[ $ranks -gt 1 || -n ${DS_CONFIG:-} ]]; }

# Check what needs no Python, before anything is installed.
check_settings() {
    [[ ${GORP_ENV:-active} == active ]] || fail "GORP_ENV=$GORP_ENV; allowed: active, or unset"
    local variable hint='data/make_order.py makes one'
    [[ ! $name =~ ^order_[0-9]+$ ]] || hint="did you mean ${name/_/}?"
    [[ $name =~ ^[A-Za-z0-9_.-]+$ && $name != ds && -d configs/${name}_configs ]] ||
        fail "order '$name': no folder configs/${name}_configs; $hint"
    [[ ${DRY_RUN:-1} == 1 ]] || fail "DRY_RUN=$DRY_RUN; allowed: 1, or unset"
    for variable in NPROC NNODES MASTER_PORT SAVE_STEPS; do
        [[ ${!variable:-1} =~ ^[1-9][0-9]*$ ]] || fail "$variable=${!variable}; allowed: a whole number, 1 or more"
    done
    count_ranks
    [[ -z ${DS_CONFIG:-} || -f $DS_CONFIG ]] || fail "DS_CONFIG=$DS_CONFIG: no such file"
    [[ -z ${DATA_DIR:-} || -d $DATA_DIR ]] || fail "DATA_DIR=$DATA_DIR: no such folder"
    [ -z "$(in_extra --output_dir '')" ] || fail "EXTRA: found --output_dir; OUTPUT=FOLDER says where results go"
    [[ $preset != released || ($ranks -eq 1 && -z ${DS_CONFIG:-}) ]] ||
        fail "--preset released: found with NPROC=$ranks${DS_CONFIG:+ and DS_CONFIG=$DS_CONFIG}; allowed: one" \
             "process without DeepSpeed"
}

# Set `nodes`, the number of machines, and `ranks`, that of processes on all of them: NPROC on each, or as HOSTFILE
# says. With NNODES above 1, set `node` to the number of this machine.
count_ranks() {
    nodes=${NNODES:-1} node=0 ranks=$((${NNODES:-1} * ${NPROC:-1}))
    if [ -n "${HOSTFILE:-}" ]; then
        local line='^[^ #]+ +slots=[1-9][0-9]*[[:space:]]*$' none='^[[:space:]]*(#.*)?$'
        [[ -z ${NPROC:-}${NNODES:-} ]] || fail "HOSTFILE=$HOSTFILE: found with NPROC or NNODES, which the file decides"
        [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file"
        ! grep -vqE "$line|$none" "$HOSTFILE" && grep -qE "$line" "$HOSTFILE" ||
            fail "HOSTFILE=$HOSTFILE: found '$(grep -vE "$line|$none" "$HOSTFILE" | head -n 1)'; allowed:" \
                 "lines 'host slots=GPUS'"
        nodes=$(grep -cE "$line" "$HOSTFILE")
        [ "$nodes" -gt 1 ] ||
            fail "HOSTFILE=$HOSTFILE: names one machine; allowed: two or more (or NPROC=GPUS, on that machine)"
        ranks=$(grep -E "$line" "$HOSTFILE" | awk -F= '{ n += $2 } END { print n }')
    elif [ "$nodes" -gt 1 ]; then
        node=${NODE_RANK:-}
        [[ $node =~ ^[0-9]+$ && $node -lt $nodes ]] ||
            fail "NODE_RANK=$node; allowed: 0 to $((nodes - 1)) with NNODES=$nodes"
        [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR: missing with NNODES=$nodes; allowed: the address of node 0"
    fi
}

check_model() {
    [[ $mode != full || -n ${MODEL:-} || -f $model/config.json ]] || fail "$model: contains no model; get the" \
        "published one (pip install huggingface_hub && hf download $source --local-dir $model), set" \
        "MODEL=FOLDER_OR_HUB_ID, or use a small model on a CPU: the same command with $small_flags"
}

# Run a command while no other node or job that shares this folder runs one.
one_at_a_time() {  # COMMAND ...
    if [ ! -w requirements.txt ] || ! command -v flock >/dev/null; then "$@"; return; fi
    {
        flock -n -E 75 9 2>/dev/null || [ $? -ne 75 ] ||
            say "another start may be preparing this folder; waiting for it" >&2
        flock 9 2>/dev/null || say "file locks fail here: start one job before the others" >&2
        "$@"
    } 9>>requirements.txt
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
    local name=$2 label=$2 nodes node ranks started extra method preset seed requirements=(requirements.txt)
    local scripts model source small_flags outputs logs deepspeed_config batch rows released_precision=''
    local shared changed=() changed_penalties=() memory_options=() gpu_options=()
    local values penalties values_from own_values='' port=''
    check_variables
    read_extra
    method=$(in_extra --method "${METHOD:-gorp}") preset=$(in_extra --preset default)
    seed=$(in_extra --seed "${SEED:-42}")
    "settings_$1" "$name" "$mode"
    check_settings
    ! uses_deepspeed || requirements+=(requirements-deepspeed.txt)
    read_values
    [ -n "${OUTPUT:-}" ] || distinguish
    local data=${DATA_DIR:-CL_Benchmark}
    [[ -n ${DATA_DIR:-} ]] || has_examples || data=data/mini_benchmark
    local order_dir=${OUTPUT:-$outputs}/$label log=${OUTPUT:-$logs}/$label.log accumulation launch options command
    [ "$node" -eq 0 ] || log=${log%.log}.node$node.log

    if [ -n "${DRY_RUN:-}" ]; then
        if [ -n "${GORP_ENV:-}" ]; then
            use "$(command -v python || command -v python3)"
        else
            find_environment "${requirements[@]}" || find_python
        fi
        set_command
        describe | masked >&2
        printf '%q ' "${command[@]}" | masked && echo
    else
        check_model
        one_at_a_time set_up "${requirements[@]}"
        has_gpu || true   # rejects a GPU that PyTorch cannot use
        set_command
        command -v "${launch[0]}" >/dev/null || fail "${launch[0]}: its package is installed, but PATH has no such" \
            "command; add the folder where pip put it to PATH"
        started=$SECONDS
        one_at_a_time make_small_parts
        trap 'say "$name: interrupted; the same command${fresh:+ without --fresh} resumes" >&2; exit 130' INT
        run_tasks
        [ "$node" -gt 0 ] || ! is_on --do_predict ||
            "$PYTHON" src/report "$order_dir" 2>&1 | "$PYTHON" scripts/terminal.py --all "$log"
        trap - INT
        say "$name took $((SECONDS - started)) s; results in $order_dir, log in $log"
        [[ $mode != tiny || -n ${OUTPUT:-} ]] || what_next
    fi
}

# Whether to use CL_Benchmark: always in a full run, with --small if it has examples, never with --tiny.
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

# Whether the command switches a flag on: where it occurs last, it has no value or a true one.
is_on() {  # FLAG
    local value=False index
    for index in "${!command[@]}"; do
        case ${command[index]} in
            "$1") value=${command[index + 1]:-True}; [[ $value != --* ]] || value=True ;;
            "$1="*) value=${command[index]#*=} ;;
        esac
    done
    [[ ${value,,} =~ ^(true|yes|t|y|1)$ ]]
}

# Read an order's own `values` and `penalties`, and its `label` in paths. Unpublished orders use order 1's values.
read_values() {
    local script=$scripts/order_1.sh
    if [[ $name =~ ^order([0-9]+)$ ]]; then
        label=order_${BASH_REMATCH[1]}
        [ ! -f "$scripts/$label.sh" ] || script=$scripts/$label.sh own_values=yes
    fi
    # shellcheck source=scripts/order_1.sh
    source "$script"
    values_from=$script
}

# Append to `label`, which names the default folder, what distinguishes the run from the plain published one.
distinguish() {
    local own=${MODEL:-$model}
    [ ! -d "$own" ] || own=$(cd "$own" && pwd)
    own=${own%/} own=${own##*/}
    [ "$mode" = full ] || label+=-$mode
    [[ $own == "${model##*/}" || ($mode == full && $own == "${source##*/}") ]] || label+=-$own
    [ "$method" = gorp ] || label+=-$method
    [ "$preset" = default ] || label+=-$preset
    [ "$seed" = 42 ] || label+=-seed$seed
    label=${label//[^A-Za-z0-9_.-]/_}   # a bad value is part of a path until the entry rejects it
}

# After a run of a tiny model: what it is good for, and what to try next.
what_next() {
    local other again="bash $scripts/order.sh --tiny $name"
    say "a model of a million weights tests the code, not the method; its scores say little about larger models"
    for other in gorp seqlora sgorp; do
        [ "$other" = "$method" ] || say "another method:  METHOD=$other $again"
    done
    say "all of them compared:  ${PYTHON#"$PWD"/} src/report $outputs --out report"
}

# Create the data and model of small runs if they are missing.
make_small_parts() {
    if [[ $data == data/mini_benchmark && ! -d $data ]]; then "$PYTHON" data/mini_benchmark.py; fi
    if [[ $mode == small && -z ${MODEL:-} && ! -d $model ]]; then "$PYTHON" initial_model/unpack_small.py smollm2; fi
}

# Set `command`, which runs the order. A later flag overrides an earlier one: those for a small model follow the
# published ones, and EXTRA follows all.
set_command() {
    local index own
    options=("${shared[@]}" "${values[@]}")
    # Other methods have their own defaults for penalties, and the released code computes none.
    [[ $method != gorp || $preset == released ]] || options+=("${penalties[@]}" "${changed_penalties[@]}")
    options+=("${changed[@]}")
    if [ "$preset" != released ]; then
        options+=("${memory_options[@]}")
        [ ${#gpu_options[@]} -eq 0 ] || ! has_gpu || options+=("${gpu_options[@]}")
    fi
    # A step sees `rows` examples if the number of ranks divides them, or with EXTRA's `batch`, if batch x ranks does.
    [ $((batch * ranks)) -le "$rows" ] || batch=$((rows > ranks ? rows / ranks : 1))
    own=$(in_extra --per_device_train_batch_size '')
    [[ ! $own =~ ^[1-9][0-9]*$ ]] || batch=$own
    accumulation=$((rows / (batch * ranks)))
    [ "$accumulation" -ge 1 ] || accumulation=1
    own=$(in_extra --gradient_accumulation_steps '')
    [[ ! $own =~ ^[1-9][0-9]*$ ]] || accumulation=$own
    options+=(--per_device_train_batch_size "$batch" --gradient_accumulation_steps "$accumulation")
    set_launch
    [ -z "${SAVE_STEPS:-}" ] ||
        options+=(--save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 2 --drop_checkpoints)
    [ -z "$fresh" ] || options+=(--fresh "$log")
    command=(
        "${launch[@]}" src/run_order.py "configs/${name}_configs" --model_name_or_path "${MODEL:-$model}"
        --data_dir "$data" --output_dir "$order_dir/outputs" --method "${METHOD:-gorp}" --seed "${SEED:-42}"
        "${options[@]}" "${extra[@]}"
    )
    [ -n "${HOSTFILE:-}" ] || return 0
    [[ $PWD != *[[:space:]]* ]] ||
        fail "HOSTFILE: found whitespace in '$PWD', which DeepSpeed's launcher does not preserve"
    for ((index = ${#launch[@]} + 1; index < ${#command[@]}; index++)); do
        [[ ${command[index]} != *[[:space:]]* ]] ||
            fail "HOSTFILE: found whitespace in '${command[index]}', which DeepSpeed's launcher does not preserve"
        printf -v "command[index]" '%q' "${command[index]}"   # a shell on each machine parses them once more
    done
}

# Set `launch`, the program that starts the processes: Python for one; DeepSpeed's launcher on one machine or those of
# HOSTFILE; torchrun on each of NNODES, or if CUDA_VISIBLE_DEVICES is not the numbers that DeepSpeed's launcher needs.
set_launch() {
    local devices=() processes=$((ranks / nodes))
    launch=("$PYTHON")
    uses_deepspeed || return 0
    port=${MASTER_PORT:-29500}
    [[ -n ${MASTER_PORT:-} || $nodes -gt 1 ]] || port=$(free_port)
    options+=(--deepspeed "${DS_CONFIG:-$deepspeed_config}")
    if has_gpu; then
        IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-}"
    else
        options+=(--use_cpu True)   # needed by ranks on a CPU to connect
    fi
    if [ -n "${HOSTFILE:-}" ]; then
        [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || fail "HOSTFILE=$HOSTFILE: found with CUDA_VISIBLE_DEVICES, which" \
            "DeepSpeed's launcher replaces by each host's first GPUs; unset it, or start on each machine with NNODES"
        # -N keeps pdsh from putting a host's name in front of a line, which terminal.py would not recognise.
        launch=(deepspeed --hostfile "$HOSTFILE" --launcher_args=-N --master_port "$port")
        [ -z "${MASTER_ADDR:-}" ] || launch+=(--master_addr "$MASTER_ADDR")
        return
    fi
    [[ ${#devices[@]} -eq 0 || ${#devices[@]} -ge $processes ]] ||
        fail "NPROC=$processes: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names fewer devices"
    [[ -z $gpus || $gpus -ge $processes ]] ||
        fail "NPROC=$processes: PyTorch finds $gpus GPUs; allowed: at most one process for each"
    if [[ $nodes -gt 1 || ${devices[*]} == *[^0-9\ ]* ]]; then
        launch=(torchrun --nnodes "$nodes" --node_rank "$node" --nproc_per_node "$processes"
                --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port")
    elif [ ${#devices[@]} -gt 0 ]; then
        devices=("${devices[@]:0:processes}")
        launch=(deepspeed --include "localhost:$(IFS=,; echo "${devices[*]}")" --master_port "$port")
    else
        launch=(deepspeed --num_accelerators "$processes" --master_port "$port")
    fi
}

# Describe the command: the method, the source of its values, the examples per step, the precision.
describe() {
    local bits what from penalties_of='' size=$((batch * accumulation * ranks)) step precision=float32
    case $method/$preset in
        gorp/default) what='gorp, the published method' ;;
        gorp/released) what='gorp as its released code computes it (--preset released)' ;;
        sgorp/default) what="sgorp, this project's variant of gorp" ;;
        *) what=$(printf '%q, not the published method' "$method") ;;
    esac
    [ "$method" = gorp ] || penalties_of=', but its own defaults for penalties'
    case $mode$own_values in
        fullyes) from='the published values' ;;
        full) from="the published values of $values_from" ;;
        *) from='values for a small model (settings.sh)' ;;
    esac
    [[ $mode != full || -z ${MODEL:-} ]] || from+=" for $source"
    step="$size examples a step = $batch x $(counted "$accumulation" micro-batch es) on $(counted "$ranks" process es)"
    [ "$nodes" -eq 1 ] || step+=" of $nodes machines"
    [[ $size -eq $rows || -n $(in_extra --gradient_accumulation_steps '') ]] ||
        step+=" ($rows is possible only if processes x micro-batch divides it)"
    say "$name: $what, with $from$penalties_of; $step"
    [[ $mode/$data != small/data/mini_benchmark ]] ||
        say "$name: CL_Benchmark has no train.json, so the made-up texts of data/mini_benchmark are used"
    if [ -n "$released_precision" ]; then
        for bits in bf16 fp16; do
            ! is_on "--$bits" || precision=$bits
        done
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

# Run the command, log its output, and check that all tasks are finished.
run_tasks() {
    local status=0 codes tasks finished bound=()
    export TOKENIZERS_PARALLELISM=false
    [[ $mode == full || (-n ${MODEL:-} && ! -d $MODEL) ]] || export HF_HUB_OFFLINE=1
    # On a busy machine, threads that wait for one another made a tiny task of one minute take five.
    [ "$mode" != tiny ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # If this script is killed, its processes end too; otherwise they would train on, unseen.
    ! setpriv --pdeathsig TERM true 2>/dev/null || bound=(setpriv --pdeathsig TERM)
    {
        printf '%q ' "${command[@]}" | masked && echo
        describe
        [ "$mode" != full ] || has_gpu || say "$name: no GPU is visible; training uses the CPU"
        say "checking $name: data, flags and model"
        exec "${bound[@]}" "${command[@]}"
    } 2>&1 | "$PYTHON" scripts/terminal.py "$log" || status=$?
    # On a CPU, DeepSpeed does not free 67 MB of shared memory for each rank, even when it ends normally.
    [ -z "$port" ] || rm -f "/dev/shm/deepspeed_allreduce_buffer_${UID}_"*"_${port}_"*
    shopt -s nullglob
    tasks=("configs/${name}_configs"/*/) finished=("$order_dir"/outputs/*/completed.json)
    shopt -u nullglob
    # torchrun returns 1 whatever its processes return, and ends those that are left with SIGTERM.
    if [[ $status -eq 1 && ${launch[0]} == torchrun ]]; then
        codes=$(tail -n 50 "$log" | sed -nE 's/.*exitcode *: (-?[0-9]+) .*/\1/p' | sort -nr)
        case $codes in
            2 | 2$'\n'*) status=2 ;;
            -*) status=$((128 - ${codes%%$'\n'*})) ;;
        esac
    fi
    # The deepspeed launcher returns 0 when a signal ended it. The first node's files may not be visible yet on others.
    [[ $status -ne 0 || $node -gt 0 || ${#finished[@]} -ge ${#tasks[@]} ]] || status=1
    case $status in
        0) ;;
        2) [ ! -f "$log" ] || tail -n 50 "$log" | grep -q '^error: ' ||
               echo "error: $name could not start; its log: $log" >&2
           exit 2 ;;   # bad input, which one line has explained
        *) echo "error: $name stopped with exit code $status$(signal_of $status) in task $((${#finished[@]} + 1)) of" \
               "${#tasks[@]}; its log: $log${fresh:+. The same command without --fresh resumes}" >&2
           exit $status ;;
    esac
}

# The signal that ended a process with this exit code, if any: 128 + n in a shell, 256 - n from the launcher.
signal_of() {  # EXIT_CODE
    local number=$(($1 > 192 ? 256 - $1 : $1 - 128))
    [ $number -lt 1 ] || echo " (a process was ended by SIG$(kill -l "$number" 2>/dev/null || echo "NAL $number"))"
}
