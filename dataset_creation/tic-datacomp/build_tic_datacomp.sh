#!/usr/bin/env bash
# Builds TiC-DataComp from a pool in DataComp's format and the published UID lists: the training splits and both
# evaluation sets of every year and month, in one pass over the pool. Run it again to resume. 12.7 B samples take days on a
# cluster, 100,000 take seconds. The yearly and the monthly data each need as much disk as the pool.
#
#   .venv/bin/python dataset_creation/tic-datacomp/download_uids.py --output-path data/lists/released
#   POOL=/pool DATA_DIR=data bash dataset_creation/tic-datacomp/build_tic_datacomp.sh
#
# Relative paths start from the current folder; by default DATA_DIR is data/ and LISTS is data/lists/ in the checkout.
# LISTS holds released/, and gets uids/ and classes/. FILTER_UIDS is a .npy of the UIDs that pass a filter, as written by
# DataComp's baselines.py; training splits then hold only those. FILTER names it: basic (default; train/) or bestpool
# (train_bestpool/). CADENCE=yearly or monthly makes only one of the two. FLAGS are further flags of reshard.py, such as
# "--parts 60 --engine ray --ray-address auto" or "--skip-bad-shards" (for a single --part, call reshard.py yourself).
# Prints a table of the splits (samples, shards, bytes, coverage of the lists), also in DATA_DIR/tic/datacomp/summary.txt.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/cli.sh"
checkout=$root/
if [[ $PWD == "$root" ]]; then checkout=; fi

POOL=${POOL:-}
DATA_DIR=${DATA_DIR:-${checkout}data}
LISTS=${LISTS:-${checkout}data/lists}
CADENCE=${CADENCE:-}
FILTER=${FILTER:-basic}
FILTER_UIDS=${FILTER_UIDS:-}
NUM_WORKERS=${NUM_WORKERS:-$(nproc)}
read -ra flags <<< "-j $NUM_WORKERS ${FLAGS:-}"

[ -n "$POOL" ] || fail "POOL is not set: the folder of the pool's tars, or its URL"
[[ $POOL == *://* || -d $POOL ]] || fail "POOL is $POOL, which is not a folder"
[[ -n $FILTER_UIDS || $FILTER == basic ]] || fail "FILTER is $FILTER without FILTER_UIDS, the .npy of the UIDs that pass it"
[[ $CADENCE =~ ^(yearly|monthly)?$ ]] || fail "CADENCE is $CADENCE; it can be yearly or monthly, or is left out for both"

python=$root/.venv/bin/python
here=$root/dataset_creation/tic-datacomp
data=${DATA_DIR%/}/tic/datacomp
below=${CADENCE:+/$CADENCE}

bash "$root/setup.sh"
"$python" "$here/generate_eval_uids.py" --output-path "$LISTS"
"$python" "$here/generate_datacompnet_uid2classid.py" --output-path "$LISTS"
uids=$LISTS/uids
if [ -n "$FILTER_UIDS" ]; then
    uids=$LISTS/$FILTER
    "$python" "$here/filter_uids.py" --uids "$LISTS/uids" --filter-uids "$FILTER_UIDS" --output-path "$uids" --filter "$FILTER"
fi
if [[ -d $LISTS/classes$below ]]; then flags+=(-c "$LISTS/classes$below"); fi  # months may have none
table=$("$python" "$root/dataset_creation/reshard.py" -i "$POOL" -o "$data$below" -s "$uids$below" "${flags[@]}")
if [[ $DATA_DIR != *://* && " ${flags[*]} " != *" --dry-run "* ]]; then
    for folder in "$data"/${CADENCE:-*}/eval/*/; do
        case $folder in
            */retrieval/) bash "$here/convert_wds.sh" "$folder" retrieval ;;
            */datacompnet/) bash "$here/convert_wds.sh" "$folder" classification ;;
        esac
    done
    summary=${table//  already there/}
    if [[ $(cat "$data/summary.txt" 2>/dev/null) != "$summary" ]]; then printf '%s\n' "$summary" > "$data/summary.txt"; fi
fi
printf '%s\n' "$table"
