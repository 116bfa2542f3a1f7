#!/usr/bin/env bash
# Make evaluation splits readable for clip_benchmark and DataComp's evaluate.py, which want DIR/test/{0,1,...}.tar.
#
#   bash dataset_creation/tic-datacomp/convert_wds.sh data/tic/datacomp/yearly/eval/retrieval/2014 retrieval
#   bash dataset_creation/tic-datacomp/convert_wds.sh data/tic/datacomp/yearly/eval/datacompnet classification
#
# DIR is a split, flat or in parts, or a folder of splits. The tars keep their names and places: test/0.tar is a relative
# link to ../00000000.tar, or to ../00000/00000000.tar of the first part that has one; in a folder of its own because
# whoever reads DIR/*.tar would count each shard twice. Also adds test/nshards.txt, dataset_type.txt and, for
# classification, classnames.txt and zeroshot_classification_templates.txt: those of the folder above if it has them, or
# else ImageNet's as OpenCLIP has them. Removes and changes nothing that is there; a second run changes nothing, and
# completes one that was killed. A split without a sample is left as it is.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
[[ ${1:-} != @(-h|--help) ]] || source "$ROOT/scripts/cli.sh"
[ -x "$(command -v "$PYTHON")" ] || { echo "error: $PYTHON is missing: run: bash $ROOT/setup.sh" >&2; exit 1; }

exec "$PYTHON" "$ROOT/dataset_creation/tic-datacomp/convert_wds.py" "$@"
