#!/usr/bin/env bash
# TiC-DataComp, medium scale, basic filter, seven yearly steps (2014-2016 is the first), sequential.
#
#   DATA_DIR=/data OUTPUT_DIR=/runs NPROC=8 bash scripts/run_medium_basic_sequential.sh
#   DRY_RUN=1 DATA_DIR=/data bash scripts/run_medium_basic_sequential.sh     # prints the plan of every step
#
# DATA_DIR holds tic/datacomp/yearly/{train,eval}/; see the README. Samples with replacement as the benchmark does;
# RESAMPLED=0 samples exactly. On several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=medium_basic_sequential
SCALE=tic_medium
METHOD=sequential

source scripts/datacomp.sh
