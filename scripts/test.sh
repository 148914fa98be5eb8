#!/usr/bin/env bash
# The tests, after setting up what they need; arguments go to pytest: bash scripts/test.sh -m "not recipe" tests/test_x.py
source "$(dirname "$0")/lib.sh"
set_up requirements.txt requirements-test.txt
exec "$PYTHON" -m pytest "$@"
