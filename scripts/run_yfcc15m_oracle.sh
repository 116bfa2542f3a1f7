#!/usr/bin/env bash
# TiC-YFCC15M, four steps from 2004-2008 to 2013-2014, oracle: from source files to report.html.
#
#   SOURCE=sources/yfcc15m DATA_DIR=data OUTPUT_DIR=results bash scripts/run_yfcc15m_oracle.sh
#   DRY_RUN=1 DATA_DIR=data bash scripts/run_yfcc15m_oracle.sh     # prints the plan of every step
#
# SOURCE holds yfcc15m.csv and images/; without it the data must be in DATA_DIR, which is so for a dry run, too.
# BENCHMARK=yfcc15m_2011 begins with 2008-2011. Killed and started again, it goes on where it was. See the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATASET=yfcc15m
METHOD=oracle

source scripts/packed.sh
