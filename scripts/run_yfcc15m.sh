#!/usr/bin/env bash
# TiC-YFCC15M, four steps from 2004-2008 to 2013-2014, with any method: from source files to report.html.
#
#   METHOD=cumulative SOURCE=sources/yfcc15m DATA_DIR=data bash scripts/run_yfcc15m.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=data bash scripts/run_yfcc15m.sh     # prints the plan of every step
#
# SOURCE holds yfcc15m.csv and images/ (docs/yfcc_redcaps.md). Without it, and for a dry run, the data must be in
# DATA_DIR. TEST_SHARE and OVERWRITE=1 are flags of create_splits.py. BENCHMARK=yfcc15m_2011 begins with 2008-2011. Run it
# again after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export SCALE=${SCALE:-tic_yfcc15m}
run --benchmark yfcc15m
