#!/usr/bin/env bash
# TiC-RedCaps, four steps from 2011-2017 to 2020, oracle: from source files to report.html.
#
#   SOURCE=sources/redcaps DATA_DIR=data OUTPUT_DIR=results bash scripts/run_redcaps_oracle.sh
#   DRY_RUN=1 DATA_DIR=data bash scripts/run_redcaps_oracle.sh     # prints the plan of every step
#
# SOURCE holds annotations/ and images/; without it the data must be in DATA_DIR, which is so for a dry run, too.
# Killed and started again, it goes on where it was. See the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATASET=redcaps
METHOD=oracle

source scripts/packed.sh
