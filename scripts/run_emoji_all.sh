#!/usr/bin/env bash
# TiC-Emoji with every method, and one table and figure that compare them.
#
#   bash scripts/run_emoji_all.sh                                      # about half an hour on two cores
#   METHODS="cumulative sequential" bash scripts/run_emoji_all.sh     # some of them
#
# The oracle spends t times as much at step t, so it takes most of the time. Writes results/emoji/{method}/ and the
# comparison in results/emoji/comparison/. Killed and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh

METHODS=${METHODS:-cumulative cumulative-exp cumulative-equal sequential restart patching lwf oracle}
RESULTS=${RESULTS:-results/emoji}

for method in $METHODS; do
    METHOD=$method OUT=$RESULTS/$method REMOTE=${REMOTE:+${REMOTE%/}/$method} bash scripts/run_emoji_cumulative.sh
done
[ "${DRY_RUN:-0}" = 0 ] || exit 0
runs=()
for method in $METHODS; do runs+=("$RESULTS/$method"); done
.venv/bin/python scripts/report.py "${runs[@]}" --out "$RESULTS/comparison"
