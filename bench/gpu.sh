#!/usr/bin/env bash
# On a machine with a CUDA GPU, in some seven minutes: the tests marked gpu, then training and evaluation as bench/train.py
# and bench/evaluate.py measure them. PYTHON is the Python to use; a part that fails does not stop the others.
#
#   bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh
PYTHON=${PYTHON:-.venv/bin/python}
workers=$(($("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))') - 2))
failed=0

part() { printf '\n== %s\n' "$*"; SECONDS=0; "$@" 2> >(grep -v 'batch/s\]' | tail -n 25 >&2) || failed=1; printf '%s s\n' "$SECONDS"; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
part "$PYTHON" -m pytest -q -rs -m gpu $(grep -l pytest.mark.gpu tests/*.py)
sizes=(--image 256 --workers "$workers")
part "$PYTHON" bench/train.py --model ViT-B-32 --batch 512 --iterations 60 --rounds 1 --images 2400 "${sizes[@]}"
part "$PYTHON" bench/evaluate.py --model ViT-B-16 --images 3000 "${sizes[@]}"
exit "$failed"
