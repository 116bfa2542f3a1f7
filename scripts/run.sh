#!/usr/bin/env bash
# Any benchmark, with any method and scale; your own from its benchmark.yaml: see docs/own_data.md.
#
#   BENCHMARK=lists/benchmark.yaml SOURCE=images DATA_DIR=data METHOD=cumulative SCALE=tic_redcaps bash scripts/run.sh
#   DRY_RUN=1 BENCHMARK=lists/benchmark.yaml DATA_DIR=data METHOD=oracle SCALE=my_scale.yaml bash scripts/run.sh
#
# BENCHMARK is a name, or the file that dataset_creation/create_splits.py has written. With TABLE that is run first:
# TABLE_IMAGE, TABLE_CAPTION, TABLE_DATE, TABLE_LABEL, TABLE_KEY, TABLE_EVERY, TABLE_STEPS and TEST_SHARE are its flags,
# and the name is that of the file's folder; without BENCHMARK the file is DATA_DIR/lists/photos/benchmark.yaml for
# TABLE=photos.csv. With SOURCE, a folder of images or archives, the lists beside the file are
# packed; without it the shards must be in DATA_DIR. Writes OUTPUT_DIR/NAME/METHOD/. Killed and started again, it goes on
# where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

[ -n "${BENCHMARK:-}${TABLE:-}" ] || fail "BENCHMARK is not set: give a name or a benchmark.yaml, or a TABLE (--help shows how)"
run
