#!/usr/bin/env bash
# Makes evaluation splits readable for clip_benchmark and DataComp's evaluate.py, which expect DIR/test/{0,1,...}.tar.
#
#   bash dataset_creation/tic-datacomp/convert_wds.sh data/tic/datacomp/yearly/eval/retrieval/2014 retrieval
#   bash dataset_creation/tic-datacomp/convert_wds.sh data/tic/datacomp/yearly/eval/datacompnet classification
#
# DIR is a split, flat or in parts, or a folder of splits. The tars stay where they are: test/0.tar is a relative link to
# ../00000000.tar, or to ../00000/00000000.tar of the first part that has one. The links have their own folder, so that
# readers of DIR/*.tar do not count each shard twice. Also adds test/nshards.txt, dataset_type.txt and, for
# classification, classnames.txt and zeroshot_classification_templates.txt, from the folder above if it has them, or else
# OpenCLIP's for ImageNet. Changes and removes no existing file; run it again after an interruption. Leaves a split
# without samples as it is.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
[[ ${1:-} != @(-h|--help) ]] || source "$ROOT/scripts/cli.sh"
[ -x "$(command -v "$PYTHON")" ] || { echo "error: $PYTHON is missing: run: bash $ROOT/setup.sh" >&2; exit 1; }

exec "$PYTHON" "$ROOT/dataset_creation/tic-datacomp/convert_wds.py" "$@"
