#!/usr/bin/env bash
# TiC-Emoji, seven steps from 2014 to 2025: trains a small CLIP through time and prints the step × year matrix.
#
#   bash scripts/run_emoji_cumulative.sh                      # a few minutes on two cores, no GPU needed
#   METHOD=sequential bash scripts/run_emoji_cumulative.sh    # or oracle; each has its own folder in results/emoji/
#
# Writes results/emoji/$METHOD/: a folder per step, eval_results.jsonl, matrix.csv, summary.json, table.md, table.tex,
# heatmap.png, report.html. Run it again after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

export SCALE=${SCALE:-tic_tiny}
[ -n "${METHODS:-}" ] || export METHOD=${METHOD:-cumulative}
run --benchmark emoji
