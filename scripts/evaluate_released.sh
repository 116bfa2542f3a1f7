#!/usr/bin/env bash
# Evaluates every step of the released TiC-CLIP models on TiC-DataComp (or other tasks), and writes one table.
#
#   bash scripts/fetch_models.sh data/models && DATA_DIR=/data bash scripts/evaluate_released.sh
#   MODELS="basic-cumulative bestpool-oracle" DATA_DIR=/data bash scripts/evaluate_released.sh     # some of them
#   DRY_RUN=1 DATA_DIR=/data bash scripts/evaluate_released.sh         # prints what is missing, evaluates nothing
#
# MODELS_DIR is the folder from fetch_models.sh; MODELS is by default all models in it. TASKLIST, IMAGENET_VAL,
# PRECISION, BATCH_SIZE, WORKERS, DEVICE and SKIP_BAD=1 are flags of scripts/evaluate.py. Writes the results to
# OUT/TiC-CLIP-{model}/ and their comparison to OUT. Run it again after an interruption to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cli.sh"

MODELS_DIR=${MODELS_DIR:-${here}data/models}
DATA_DIR=${DATA_DIR:-${here}data}
OUT=${OUT:-${here}results/released}

flags_of=(TASKLIST IMAGENET_VAL PRECISION BATCH_SIZE WORKERS DEVICE)
bash "$root/setup.sh"
"$root/.venv/bin/python" -m tic_clip.settings MODELS_DIR MODELS MODEL DATA_DIR OUT SKIP_BAD DRY_RUN "${flags_of[@]}"
if [ -z "${MODELS:-}" ]; then
    MODELS=$(cd "$MODELS_DIR" 2> /dev/null && ls -d TiC-CLIP-*/ 2> /dev/null | sed 's|^TiC-CLIP-||; s|/$||') ||
        fail "$MODELS_DIR has no TiC-CLIP-*/: run: bash scripts/fetch_models.sh $MODELS_DIR"
fi
flags=(--data_dir "$DATA_DIR")
for variable in "${flags_of[@]}"; do
    [ -z "${!variable:-}" ] || flags+=("--${variable,,}" "${!variable}")
done
! is_on SKIP_BAD || flags+=(--skip_bad)
! is_on DRY_RUN || flags+=(--dry_run)

runs=()
for model in $MODELS; do
    runs+=("$OUT/TiC-CLIP-$model")
    "$root/.venv/bin/python" "$root/scripts/evaluate.py" --released "$MODELS_DIR/TiC-CLIP-$model" --output_dir "${runs[-1]}" "${flags[@]}"
done
is_on DRY_RUN || "$root/.venv/bin/python" "$root/scripts/report.py" "${runs[@]}" --out "$OUT"
