#!/usr/bin/env bash
# On a machine with a CUDA GPU, in at most six minutes: the tests marked gpu (a step killed and resumed with amp, and in two
# passes with amp_bf16), then training of ViT-B-32 and ViT-B-16 beside stock OpenCLIP with the same batch, and evaluation,
# as bench/train.py and bench/evaluate.py measure them. A part that fails does not stop the others, and one that
# has no time left is named. PYTHON is the Python to use, LIMIT the seconds.
#
#   bash bench/gpu.sh
#   LIMIT=900 bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${LIMIT:-360}
failed=0

part() {
    local left=$((LIMIT - SECONDS)) start=$SECONDS status
    printf '\n== %s\n' "$*"
    if [ "$left" -lt 5 ]; then echo "left out: $LIMIT s are over" && failed=1 && return; fi
    timeout --kill-after 5 "$left" "$@" 2> >(grep -v 'batch/s\]' | tail -n 25 >&2)
    status=$?
    [ "$status" = 0 ] || failed=1
    [ "$status" != 124 ] || echo "cut off: $LIMIT s are over"
    printf '%s s\n' "$((SECONDS - start))"
}

if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader; fi
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
workers=$("$PYTHON" -c 'import os; print(max(0, len(os.sched_getaffinity(0)) - 2))')
train=("$PYTHON" bench/train.py --rounds 1 --image 256 --images 2400 --workers "$workers")
part "${train[@]}" --model ViT-B-32 --batch 512 --iterations 120 --contenders stock patched ours "ours, amp" "ours, 4 passes"
part "${train[@]}" --model ViT-B-16 --batch 256 --iterations 80 --contenders stock ours "ours, --torchcompile"
part "$PYTHON" -m pytest -q -rs -m gpu -p no:cacheprovider $(grep -rl pytest.mark.gpu tests)
part "$PYTHON" bench/evaluate.py --model ViT-B-16 --images 3000 --image 256 --workers "$workers"
exit "$failed"
