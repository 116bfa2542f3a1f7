#!/usr/bin/env bash
# TiC-DataComp with any method, scale and filter, for those that have no run_{scale}_{filter}_{method}.sh of their own.
#
#   METHOD=lwf DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_datacomp.sh            # medium, basic
#   METHOD=restart SCALE=tic_large FILTER=bestpool DATA_DIR=/data NPROC=8 bash scripts/run_datacomp.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=/data bash scripts/run_datacomp.sh      # prints the plan of every step
#   METHOD=cumulative SCALE=tic_debug DATA_DIR=/data bash scripts/run_datacomp.sh              # a small run first
#
# Writes OUTPUT_DIR/medium_basic_lwf/ and so on. DATA_DIR as for the others; see the README. Samples with replacement as
# the benchmark does, but patching exactly; RESAMPLED=0 and RESAMPLED=1 choose. Several machines: docs/cluster.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh

METHOD=${METHOD:-}
[ -n "$METHOD" ] || fail "METHOD is not set: cumulative-exp, cumulative-equal, restart, patching, lwf, or another of the README"
SCALE=${SCALE:-tic_medium}
FILTER=${FILTER:-basic}

source scripts/datacomp.sh
