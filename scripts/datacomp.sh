# What every TiC-DataComp run shares: run_{scale}_{filter}_{method}.sh and run_datacomp.sh set SCALE, FILTER and METHOD
# and source this file. BENCHMARK=datacomp_monthly runs over the 102 months.
source scripts/cli.sh
[ -n "${SCALE:-}" ] || fail "scripts/datacomp.sh is a part of the run_*.sh: start one of those"
BENCHMARK=${BENCHMARK:-datacomp}
NAME=${SCALE#tic_}_${FILTER}_$METHOD
[ "$BENCHMARK" = datacomp ] || NAME+=_${BENCHMARK#datacomp_}
DATA_DIR=${DATA_DIR:-data}
OUT=${OUTPUT_DIR:-results}/$NAME
REMOTE=${REMOTE:+${REMOTE%/}/$NAME}

# Patching chooses its coefficient on data that it holds out, and only exact sampling can hold data out.
[ "$METHOD" != patching ] || RESAMPLED=${RESAMPLED:-0}
RESAMPLED=${RESAMPLED:-1}

bash setup.sh
source scripts/loop.sh
