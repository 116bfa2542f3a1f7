#!/usr/bin/env bash
# TiC-Emoji with every method, and one table and figure that compare them.
#
#   bash scripts/run_emoji_all.sh                                      # about half an hour on two cores
#   METHODS="cumulative sequential" bash scripts/run_emoji_all.sh     # some of them
#
# The oracle spends t times as much at step t, so it takes most of the time. Writes RESULTS/{method}/ and the comparison
# RESULTS/comparison/; RESULTS is results/emoji by default. Killed and started again, it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

METHODS=${METHODS:-cumulative cumulative-exp cumulative-equal sequential restart patching lwf oracle}
RESULTS=${RESULTS:-${here}results/emoji}

runs=()
for method in $METHODS; do
    runs+=("$RESULTS/$method")
    METHOD=$method OUT=${runs[-1]} REMOTE=${REMOTE:+${REMOTE%/}/$method} bash "$root/scripts/run_emoji_cumulative.sh"
done
is_on DRY_RUN || "$root/.venv/bin/python" "$root/scripts/report.py" "${runs[@]}" --out "$RESULTS/comparison"
