#!/usr/bin/env bash
# TiC-DataComp, medium scale, basic filter, seven yearly steps (2014-2016 is the first), cumulative.
#
#   DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_medium_basic_cumulative.sh
#   DRY_RUN=1 DATA_DIR=/data bash scripts/run_medium_basic_cumulative.sh     # prints the plan of every step
#
# DATA_DIR holds tic/datacomp/yearly/{train,eval}/; see the README. Samples with replacement as the benchmark does;
# RESAMPLED=0 samples exactly. On several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=medium_basic_cumulative
SCALE=tic_medium
METHOD=cumulative

source scripts/datacomp.sh
