#!/usr/bin/env bash
# Runs a run_*.sh on the nodes of a Slurm job, one task per node and one process per GPU. All nodes must see the
# checkout, DATA_DIR and the output folder. From the root of the checkout:
#
#   DATA_DIR=/data OUTPUT_DIR=/runs sbatch --nodes 4 scripts/slurm.sh scripts/run_medium_basic_cumulative.sh
#
# Options of sbatch go before scripts/slurm.sh (--time, --partition, --account, --gpus-per-node …) and override those
# below. The job requeues itself two minutes before the time limit, and Slurm requeues it when a node fails or the job is
# preempted. It then resumes from the step's newest checkpoint, which is at most about SAVE_MINUTES (10) old.
#
#SBATCH --job-name=tic-clip
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
[[ ${1:-} != @(-h|--help) ]] || source "$(dirname "$0")/cli.sh"
[ -n "${SLURM_SUBMIT_DIR:-}" ] || { echo "error: SLURM_SUBMIT_DIR is not set: start this with sbatch (--help shows how)" >&2; exit 1; }
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this file from elsewhere

[ $# = 1 ] && [ -f "$1" ] || { echo "error: no script in '$*': give one run_*.sh, from the checkout's root" >&2; exit 1; }
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_NNODES MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}  # two jobs on a machine do not meet

bash setup.sh  # once; the nodes then find all done
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=none \
    bash -c 'export NODE_RANK=$SLURM_NODEID NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}; exec bash "$1"' task "$1" &
wait $!  # in the background, as bash runs a trap only between two commands
