#!/usr/bin/env bash
# TiC-YFCC15M with any method, for those that have no run_yfcc15m_{method}.sh of their own.
#
#   METHOD=lwf SOURCE=sources/yfcc15m DATA_DIR=data bash scripts/run_yfcc15m.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=data bash scripts/run_yfcc15m.sh     # prints the plan of every step
#
# SOURCE holds yfcc15m.csv and images/; without it the data must be in DATA_DIR, which is so for a dry run, too.
# BENCHMARK=yfcc15m_2011 begins with 2008-2011. Killed and started again, it goes on where it was. See the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh

DATASET=yfcc15m
METHOD=${METHOD:-}
[ -n "$METHOD" ] || fail "METHOD is not set: cumulative-exp, cumulative-equal, restart, patching, lwf, or another of the README"

source scripts/packed.sh
