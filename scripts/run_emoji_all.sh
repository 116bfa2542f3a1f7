#!/usr/bin/env bash
# TiC-Emoji with the eight methods of the paper, and one table and figure that compare them.
#
#   bash scripts/run_emoji_all.sh                                      # about half an hour on two cores
#   METHODS="cumulative sequential" SEEDS="0 1 2" bash scripts/run_emoji_all.sh     # any of all, three times
#
# The oracle spends t times as much at step t, so it takes a third of the time. Writes OUT/{method}/, of another seed than 0
# OUT/{method}_seed1/, and the comparison OUT/comparison/; OUT is results/emoji by default. Killed and started again, it
# goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

all="cumulative cumulative-exp cumulative-equal sequential restart patching lwf oracle"
[ -n "${METHODS:-}" ] || { METHODS=${METHOD:-$all} && unset METHOD; }
export METHODS SCALE=${SCALE:-tic_tiny} OUT=${OUT:-${RESULTS:-${OUTPUT_DIR:-${here}results}/emoji}}
run --benchmark emoji
