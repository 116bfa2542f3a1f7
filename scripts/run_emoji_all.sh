#!/usr/bin/env bash
# Runs TiC-Emoji with the paper's eight methods, and compares them in one table and figure.
#
#   bash scripts/run_emoji_all.sh                                      # about half an hour on two cores
#   METHODS="cumulative sequential" SEEDS="0 1 2" bash scripts/run_emoji_all.sh     # some methods, three times each
#
# The oracle takes a third of the time, because it spends t times as much at step t. Writes OUT/{method}/ (for seeds
# other than 0 OUT/{method}_seed1/) and the comparison OUT/comparison/; OUT is results/emoji by default. Run it again
# after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

all="cumulative cumulative-exp cumulative-equal sequential restart patching lwf oracle"
[ -n "${METHODS:-}" ] || { METHODS=${METHOD:-$all} && unset METHOD; }
export METHODS SCALE=${SCALE:-tic_tiny} OUT=${OUT:-${RESULTS:-${OUTPUT_DIR:-${here}results}/emoji}}
run --benchmark emoji
