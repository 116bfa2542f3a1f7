#!/usr/bin/env bash
# TiC-RedCaps with any method, for those that have no run_redcaps_{method}.sh of their own.
#
#   METHOD=lwf SOURCE=sources/redcaps DATA_DIR=data bash scripts/run_redcaps.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=data bash scripts/run_redcaps.sh     # prints the plan of every step
#
# SOURCE holds annotations/ and images/; without it the data must be in DATA_DIR, which is so for a dry run, too.
# Killed and started again, it goes on where it was. See the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh

DATASET=redcaps
METHOD=${METHOD:-}
[ -n "$METHOD" ] || fail "METHOD is not set: cumulative-exp, cumulative-equal, restart, patching, lwf, or another of the README"

source scripts/packed.sh
