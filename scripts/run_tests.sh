#!/usr/bin/env bash
# Runs the linter and the tests; arguments go to pytest. Needs no network after setup.sh.
#
#   bash scripts/run_tests.sh                  # everything, ten minutes on two quiet cores
#   bash scripts/run_tests.sh tests/data/test_uids.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${1:-} != @(-h|--help) ]] || source scripts/cli.sh

bash setup.sh --all
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ $# = 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    set -- --numprocesses=auto --maxprocesses=8 --dist=worksteal
fi
exec .venv/bin/python -m pytest "$@"
