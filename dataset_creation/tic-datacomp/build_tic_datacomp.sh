#!/usr/bin/env bash
# Builds TiC-DataComp from a pool in DataComp's format and the released UID lists: the yearly and monthly training splits
# and both evaluation sets of every year and month, in one pass over the pool. Killed and started again, it goes on.
# 12.7 B samples take days of a cluster, 100,000 take seconds. Yearly and monthly data need the size of the pool each.
#
#   .venv/bin/python dataset_creation/tic-datacomp/download_uids.py --output-path data/lists/released
#   POOL=/pool DATA_DIR=data bash dataset_creation/tic-datacomp/build_tic_datacomp.sh
#
# LISTS holds released/, and gets uids/ and classes/. CADENCE=yearly or monthly makes one of them only. FLAGS are further
# flags of reshard.py, such as "--parts 60 --engine ray --ray-address auto" or "--skip-bad-shards". Prints a table of the
# splits (samples, shards, bytes, coverage of the lists) and leaves it in DATA_DIR/tic/datacomp/summary.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

POOL=${POOL:?is needed: the folder of the tars, or its URL}
DATA_DIR=${DATA_DIR:-data}
LISTS=${LISTS:-data/lists}
CADENCE=${CADENCE:-}
NUM_WORKERS=${NUM_WORKERS:-$(getconf _NPROCESSORS_ONLN)}
read -ra flags <<< "${FLAGS:-}"

python=.venv/bin/python
here=dataset_creation/tic-datacomp
data=${DATA_DIR%/}/tic/datacomp

bash setup.sh
"$python" "$here/generate_eval_uids.py" --output-path "$LISTS"
"$python" "$here/generate_datacompnet_uid2classid.py" --output-path "$LISTS"
summary=$("$python" dataset_creation/reshard.py -i "$POOL" -o "$data/$CADENCE" -s "$LISTS/uids/$CADENCE" \
    -c "$LISTS/classes/$CADENCE" -j "$NUM_WORKERS" "${flags[@]}")
if [[ $DATA_DIR != *://* ]]; then
    for folder in "$data"/${CADENCE:-*}/eval/retrieval; do bash "$here/convert_wds.sh" "$folder" retrieval; done
    for folder in "$data"/${CADENCE:-*}/eval/datacompnet; do bash "$here/convert_wds.sh" "$folder" classification; done
    printf '%s\n' "$summary" > "$data/summary.txt"
fi
printf '%s\n' "$summary"
