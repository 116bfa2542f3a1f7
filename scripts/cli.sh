# Settings of every run_*.sh, from the environment. docs/training.md has their meanings and defaults:
#
#   folders      DATA_DIR, OUTPUT_DIR (for all runs), OUT (for this run or sweep), REMOTE (a folder or bucket for copies)
#   the run      BENCHMARK, METHOD, SCALE, FILTER, MODEL, SEED, SAMPLES_PER_STEP, BATCH_SIZE, BUDGET, REPLAY, MIXTURE,
#                RESAMPLED=1 (with replacement), FIRST_STEP, COEFFICIENT, LOSS_WEIGHT, TEMPERATURE,
#                INIT (a checkpoint, a model such as "ViT-B-32 laion2b_s34b_b79k", or hf-hub:OWNER/NAME)
#   several      METHODS="lwf ewc", SEEDS="0 1 2": run what is missing of these, and write one report on all
#   the rate     LR, WARMUP (each one number, or one for each step), NEXT_WARMUP, SCHEDULE (cosine, const,
#                const-cooldown, wsd, rsqrt), COOLDOWN (a share of each step), KEEP_OPTIMIZER=1
#   hardware     MAX_BATCH (the largest batch a GPU holds), ACCUM_FREQ, GRAD_CHECKPOINTING=0, PRECISION (fp32, amp,
#                amp_bf16; also in evaluation), IMAGE_BACKEND (torchvision, pil), OPENCLIP_FLAGS (OpenCLIP's own, as
#                "--torchcompile --grad-clip-norm 1")
#   checkpoints  RESUME_EVERY, MAX_KEPT, SAVE_EVERY, SAVE_MINUTES; logs: REPORT_TO
#   evaluation   IMAGENET_VAL, TASKLIST (instead of all periods), SKIP_BAD=1,
#                EVALUATE=step (evaluate and report after each step; default: end)
#   shards       CACHE, CACHE_GB (a local folder that caches shards from a cloud): docs/training.md
#   processes    NPROC (on this machine), WORKERS; NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: docs/cluster.md
#
# DRY_RUN=1 prints the plan and trains nothing. Switches take 1, true or yes, and 0, false or no.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$(realpath --relative-to=. "$root")/  # the checkout, from where the user stands
[ "$here" != ./ ] || here=

head_of() { sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$1"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
is_on() {
    case ${!1:-0} in
        1 | true | yes) return 0 ;;
        0 | false | no) return 1 ;;
        *) fail "$1 is ${!1}: it must be one of 1, true, yes, 0, false, no" ;;
    esac
}
run() {
    bash "$root/setup.sh"
    exec "$root/.venv/bin/python" "$root/scripts/run.py" --script "${0##*/}" "$@"
}

case ${1:-} in
    '') ;;
    -h | --help)
        head_of "$0"
        case ${0##*/} in run_tests.sh) ;; run*.sh) echo && head_of "$root/scripts/cli.sh" ;; esac
        exit 0 ;;
    *) fail "unknown argument $1: settings come from the environment, as in NAME=value bash $0 (--help shows them)" ;;
esac
