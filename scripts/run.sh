#!/usr/bin/env bash
# Any benchmark, including your own, with any method and scale: see docs/own_data.md.
#
#   BENCHMARK=lists/benchmark.yaml SOURCE=images DATA_DIR=data METHOD=cumulative SCALE=tic_redcaps bash scripts/run.sh
#   DRY_RUN=1 BENCHMARK=lists/benchmark.yaml DATA_DIR=data METHOD=oracle SCALE=my_scale.yaml bash scripts/run.sh
#
# BENCHMARK is a name, or the file that dataset_creation/create_splits.py writes. With TABLE, the script runs
# create_splits.py first, with TABLE_IMAGE, TABLE_CAPTION, TABLE_DATE, TABLE_LABEL, TABLE_KEY, TABLE_EVERY, TABLE_STEPS
# and TEST_SHARE as its flags; the benchmark is named after the folder of BENCHMARK, which defaults to
# DATA_DIR/lists/photos/benchmark.yaml for TABLE=photos.csv. With SOURCE, a folder of images or archives, it packs the
# lists beside the file; without SOURCE the shards must be in DATA_DIR. Writes OUTPUT_DIR/NAME/METHOD/. Run it again
# after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

[ -n "${BENCHMARK:-}${TABLE:-}" ] || fail "BENCHMARK is not set: give a name or a benchmark.yaml, or a TABLE (--help shows how)"
run
