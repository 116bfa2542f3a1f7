#!/usr/bin/env bash
# TiC-RedCaps, four steps from 2011-2017 to 2020, with any method: from source files to report.html.
#
#   METHOD=cumulative SOURCE=sources/redcaps DATA_DIR=data bash scripts/run_redcaps.sh
#   DRY_RUN=1 METHOD=patching DATA_DIR=data bash scripts/run_redcaps.sh     # prints the plan of every step
#
# SOURCE holds annotations/ and images/ (docs/yfcc_redcaps.md). Without it, and for a dry run, the data must be in
# DATA_DIR. TEST_SHARE and OVERWRITE=1 are flags of create_splits.py. Run it again after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export SCALE=${SCALE:-tic_redcaps}
run --benchmark redcaps
