#!/usr/bin/env bash
# TiC-DataComp, medium scale, basic filter, seven yearly steps (2014-2016 is the first), oracle.
#
#   DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_medium_basic_oracle.sh
#   DRY_RUN=1 DATA_DIR=/data bash scripts/run_medium_basic_oracle.sh     # prints the plan of every step
#
# DATA_DIR holds tic/datacomp/yearly/{train,eval}/ (docs/data.md). Samples with replacement as the benchmark does;
# RESAMPLED=0 samples exactly. BENCHMARK=datacomp_monthly has one step per month. Several machines, Slurm:
# docs/cluster.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export RESAMPLED=${RESAMPLED:-1}
run --benchmark datacomp --scale tic_medium --filter basic --method oracle
