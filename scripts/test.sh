#!/usr/bin/env bash
# Set up what the tests need and run them; arguments go to pytest: bash scripts/test.sh tests/test_x.py. Complete runs
# (minutes each) are left out; -m "" adds them, -m recipe runs only them.
# Two files are tested at a time, each with one thread; WORKERS=0 tests all files one after the other in one process.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started by sh
source "$(dirname "$0")/lib.sh"
case ${1:-} in -h | --help) echo "usage: bash scripts/test.sh [pytest's arguments]"; print_head; exit 0 ;; esac
one_at_a_time set_up requirements.txt requirements-deepspeed.txt requirements-test.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
