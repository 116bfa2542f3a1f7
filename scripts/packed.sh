# What every TiC-YFCC15M and TiC-RedCaps run shares: run_{yfcc15m,redcaps}*.sh set DATASET and METHOD and source this.
# What SOURCE holds is split and packed first, unless that has been done; without SOURCE the data must be in DATA_DIR.
source scripts/cli.sh
[ -n "${DATASET:-}" ] || fail "scripts/packed.sh is a part of the run_*.sh: start one of those"
BENCHMARK=${BENCHMARK:-$DATASET}
[[ $BENCHMARK == "$DATASET" || $BENCHMARK == "$DATASET"_* ]] || fail "BENCHMARK is $BENCHMARK, which is none of $DATASET"
SCALE=${SCALE:-tic_$DATASET}
DATA_DIR=${DATA_DIR:-data}
[ -z "${SOURCE:-}" ] || [ -e "$SOURCE" ] || fail "SOURCE is $SOURCE, which is not there (as seen from $PWD)"
SOURCE=${SOURCE:-sources/$DATASET}
[ -e "$SOURCE" ] || [[ $DATA_DIR == *://* ]] || [ -e "$DATA_DIR/tic/$BENCHMARK" ] ||
    fail "there is neither $SOURCE (SOURCE) to make the data of, nor $DATA_DIR/tic/$BENCHMARK (DATA_DIR) with the data"
OUT=${OUTPUT_DIR:-results}/$BENCHMARK/$METHOD
REMOTE=${REMOTE:+${REMOTE%/}/$BENCHMARK/$METHOD}

bash setup.sh
if [ -e "$SOURCE" ] && [ "${DRY_RUN:-0}" = 0 ]; then
    # A wrong name shows now, not after hours of packing.
    .venv/bin/python -c 'import sys; from tic_clip import cli; from tic_clip.training import methods, scales
cli.run_main(lambda: (methods.get_method(sys.argv[1]), scales.get_scale(sys.argv[2])) and None)' "$METHOD" "$SCALE"
    cores=$(getconf _NPROCESSORS_ONLN) lists=$DATA_DIR/lists/$BENCHMARK
    case $DATASET in
        yfcc15m) from=(--csv-path "$SOURCE/yfcc15m.csv" --benchmark "$BENCHMARK") ;;
        redcaps) from=(--annotations-path "$SOURCE/annotations") ;;
    esac
    .venv/bin/python "dataset_creation/tic-$DATASET/create_splits.py" "${from[@]}" --output-path "$lists" -j "$cores"
    .venv/bin/python dataset_creation/create_tars.py --csv-path "$lists" --image-path "$SOURCE/images" \
        --output-path "$DATA_DIR" -j "$cores"
fi
source scripts/loop.sh
