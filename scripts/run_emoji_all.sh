#!/usr/bin/env bash
# TiC-Emoji with the eight methods of the paper, and one table and figure that compare them.
#
#   bash scripts/run_emoji_all.sh                                      # about half an hour on two cores
#   METHODS="cumulative sequential" SEEDS="0 1 2" bash scripts/run_emoji_all.sh     # any of all, three times
#
# The oracle spends t times as much at step t, so it takes most of the time. Writes RESULTS/{method}/, of another seed
# than 0 RESULTS/{method}_seed1/, and the comparison RESULTS/comparison/; RESULTS is results/emoji by default. Killed and
# started again, it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export METHODS=${METHODS:-cumulative cumulative-exp cumulative-equal sequential restart patching lwf oracle}
export SCALE=${SCALE:-tic_tiny} OUT=${RESULTS:-${OUTPUT_DIR:-${here}results}/emoji}
run --benchmark emoji
