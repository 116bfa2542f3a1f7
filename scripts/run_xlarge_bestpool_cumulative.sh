#!/usr/bin/env bash
# TiC-DataComp, xlarge scale, bestpool filter, seven yearly steps (2014-2016 is the first), cumulative.
#
#   DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_xlarge_bestpool_cumulative.sh
#   DRY_RUN=1 DATA_DIR=/data bash scripts/run_xlarge_bestpool_cumulative.sh     # prints the plan of every step
#
# DATA_DIR holds tic/datacomp/yearly/{train_bestpool,eval}/; see the README. Samples with replacement as the benchmark
# does; RESAMPLED=0 samples exactly. BENCHMARK=datacomp_monthly has a step a month. Several machines, Slurm:
# docs/cluster.md. POLICY=released, 2,000 iterations of warm-up in each step after the first, is the configuration of
# the released models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SCALE=tic_xlarge
FILTER=bestpool
METHOD=cumulative

source scripts/datacomp.sh
