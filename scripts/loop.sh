# The loop over time behind every run_*.sh (scripts/loop.sh), which sets BENCHMARK, SCALE, METHOD, DATA_DIR and OUT:
# trains each step, evaluates every step's model on every period, writes the report and prints the table.
#
# From the environment, as scripts/evaluate.py's flags: IMAGENET_VAL, TASKLIST (instead of all periods), PRECISION,
# SKIP_BAD=1. As scripts/train.py's flags: SAMPLES_PER_STEP, BATCH_SIZE, SEED, WORKERS, MODEL, FILTER, BUDGET, BUFFER,
# WEIGHTS, INIT, FIRST_STEP, POLICY, COEFFICIENT, BLOCK, MAX_KEPT, SAVE_EVERY, SAVE_MINUTES, REPORT_TO, REMOTE, and
# RESAMPLED=1 (sampling with replacement). NPROC (processes on this machine), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
# go to torchrun; DRY_RUN=1 prints the plan and trains nothing. `.venv/bin/python scripts/train.py --help` describes them.
set -euo pipefail
source scripts/cli.sh
[ -n "${OUT:-}" ] || fail "scripts/loop.sh is a part of the run_*.sh: start one of those"

PYTHON=.venv/bin/python
NPROC=${NPROC:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
export PYTHONUNBUFFERED=1

flags=(--benchmark "$BENCHMARK" --method "$METHOD" --scale "$SCALE" --data_dir "$DATA_DIR" --output_dir "$OUT")
for variable in SAMPLES_PER_STEP BATCH_SIZE SEED WORKERS MODEL FILTER BUDGET BUFFER WEIGHTS INIT FIRST_STEP POLICY COEFFICIENT \
    BLOCK MAX_KEPT SAVE_EVERY SAVE_MINUTES REPORT_TO REMOTE; do
    [ -z "${!variable:-}" ] || flags+=("--${variable,,}" "${!variable}")
done
[ "${RESAMPLED:-0}" = 0 ] || flags+=(--dataset_resampled)

for variable in NPROC NNODES; do
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "$variable is ${!variable}, not a whole number from 1"
done
[[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK is $NODE_RANK, not a number from 0 to $((NNODES - 1))"
launch=("$PYTHON")
if [ "$NPROC" != 1 ] || [ "$NNODES" != 1 ]; then
    launch+=(-m tic_clip.launch --nproc-per-node "$NPROC")
    if [ "$NNODES" = 1 ]; then
        launch+=(--standalone)
    else
        [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is not set: NNODES is $NNODES, and it is the first machine's name"
        launch+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
fi
export LAUNCH="${launch[*]}"  # for the command in plan.json

if [ "${DRY_RUN:-0}" != 0 ]; then
    WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" scripts/train.py "${flags[@]}" --step all --dry_run
    exit 0
fi
# A mistake in any step, or in what is evaluated at the end, shows now.
WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" scripts/train.py "${flags[@]}" --step all --check
evaluation=(--data_dir "$DATA_DIR")
for variable in IMAGENET_VAL TASKLIST PRECISION; do
    [ -z "${!variable:-}" ] || evaluation+=("--${variable,,}" "${!variable}")
done
[ "${SKIP_BAD:-0}" = 0 ] || evaluation+=(--skip_bad)
[ "$NODE_RANK" != 0 ] || "$PYTHON" scripts/evaluate.py --check --benchmark "$BENCHMARK" "${evaluation[@]}"

steps=$("$PYTHON" -m tic_clip.benchmarks "$BENCHMARK" ${FIRST_STEP:+--first "$FIRST_STEP"})
for step in $steps; do
    # What is wrong now is one line here, not one traceback a process below.
    [ "${#launch[@]}" = 1 ] || WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" scripts/train.py "${flags[@]}" --step "$step" --check
    "${launch[@]}" scripts/train.py "${flags[@]}" --step "$step"
    # A port a step, so that a machine which is ahead waits for rank 0's next store and does not join its last one.
    [ "$NNODES" = 1 ] || launch[-1]=$((launch[-1] + 1)) LAUNCH="${launch[*]}"
done
[ "$NODE_RANK" = 0 ] || exit 0

"$PYTHON" scripts/evaluate.py --train_output_dir "$OUT" "${evaluation[@]}"
"$PYTHON" scripts/report.py "$OUT" --out "$OUT"
