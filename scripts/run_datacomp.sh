#!/usr/bin/env bash
# TiC-DataComp with any method, scale (default: tic_medium) and filter (default: basic).
#
#   METHOD=lwf DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_datacomp.sh
#   METHOD=oracle SCALE=tic_large FILTER=bestpool DATA_DIR=/data NPROC=8 bash scripts/run_datacomp.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=/data bash scripts/run_datacomp.sh      # prints the plan of every step
#   METHOD=cumulative SCALE=tic_debug DATA_DIR=/data bash scripts/run_datacomp.sh              # a small run first
#
# Writes OUTPUT_DIR/medium_basic_lwf/ and so on. DATA_DIR holds tic/datacomp/yearly/{train,train_bestpool,eval}/
# (docs/data.md). Samples with replacement as the benchmark does, except patching, which holds data out; RESAMPLED=0 and
# RESAMPLED=1 override this. BENCHMARK=datacomp_monthly has one step per month. NEXT_WARMUP=2000 with tic_xlarge is the
# configuration of the released models. Several machines: docs/cluster.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export SCALE=${SCALE:-tic_medium} FILTER=${FILTER:-basic}
[[ " ${METHODS:-${METHOD:-}} " = *" patching "* ]] || export RESAMPLED=${RESAMPLED:-1}
run --benchmark datacomp
