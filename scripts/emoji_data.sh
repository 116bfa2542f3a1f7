# Builds TiC-Emoji in DATA_DIR: the pool, then its training and evaluation splits in one pass. Done already: a second.
source scripts/cli.sh
[ -n "${DATA_DIR:-}" ] || fail "scripts/emoji_data.sh is a part of the run_*.sh: start one of those"
.venv/bin/python dataset_creation/tic-emoji/create_pool.py --output_dir "$DATA_DIR"
.venv/bin/python dataset_creation/reshard.py -i "$DATA_DIR/pool" -o "$DATA_DIR/tic/emoji/yearly" -s "$DATA_DIR/uids" \
    -c "$DATA_DIR/classes.npy" -j "$(getconf _NPROCESSORS_ONLN)" > /dev/null
cp "$DATA_DIR"/eval_files/emojinet/*.txt "$DATA_DIR/tic/emoji/yearly/eval/emojinet/"
