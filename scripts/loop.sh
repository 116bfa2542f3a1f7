# The yearly loop behind every run_*.sh, which sets BENCHMARK, SCALE, METHOD, DATA_DIR and OUT and then sources this
# file. Trains each step, evaluates every step's model on every period, writes the report and prints the table.
#
# From the environment: SAMPLES_PER_STEP, SEED, WORKERS, RESAMPLED=1 (sampling with replacement), NPROC (processes on
# this machine), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, DRY_RUN=1 (print the plan, train nothing).
set -euo pipefail

PYTHON=.venv/bin/python
NPROC=${NPROC:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
export PYTHONUNBUFFERED=1

flags=(--benchmark "$BENCHMARK" --method "$METHOD" --scale "$SCALE" --data_dir "$DATA_DIR" --output_dir "$OUT")
[ -z "${SAMPLES_PER_STEP:-}" ] || flags+=(--samples_per_step "$SAMPLES_PER_STEP")
[ -z "${SEED:-}" ] || flags+=(--seed "$SEED")
[ -z "${WORKERS:-}" ] || flags+=(--workers "$WORKERS")
[ "${RESAMPLED:-0}" = 0 ] || flags+=(--dataset_resampled)

for variable in NPROC NNODES; do
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || { echo "error: $variable is ${!variable}, not a whole number from 1" >&2; exit 1; }
done
launch=("$PYTHON")
if [ "$NPROC" != 1 ] || [ "$NNODES" != 1 ]; then
    launch+=(-m torch.distributed.run --nproc-per-node "$NPROC")
    if [ "$NNODES" = 1 ]; then
        launch+=(--standalone)
    else
        launch+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:?is needed where NNODES is more than 1}"
            --master-port "${MASTER_PORT:-29500}")
    fi
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
fi
plan() { WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" scripts/train.py "${flags[@]}" --step "$1" --dry_run; }

for step in $("$PYTHON" -m tic_clip.timeline "$BENCHMARK"); do
    if [ "${DRY_RUN:-0}" != 0 ]; then
        plan "$step"
        echo "  ${launch[*]} scripts/train.py ${flags[*]} --step $step"
        continue
    fi
    # A mistake in the settings is one line here, not one traceback a process below.
    [ "${#launch[@]}" = 1 ] || plan "$step" > /dev/null
    "${launch[@]}" scripts/train.py "${flags[@]}" --step "$step"
done
[ "${DRY_RUN:-0}" = 0 ] && [ "$NODE_RANK" = 0 ] || exit 0

"$PYTHON" scripts/evaluate.py --train_output_dir "$OUT" --data_dir "$DATA_DIR"
"$PYTHON" scripts/report.py "$OUT" --out "$OUT"
