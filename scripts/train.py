"""Train one time step with a continual method, alone or under torchrun.

    python scripts/train.py --benchmark emoji --method cumulative --scale tic_tiny --step 2014 \\
        --data_dir data/emoji --output_dir results/emoji/cumulative

Writes O/STEP/: plan.json first, checkpoints and logs, and done.json last. A step that is done is skipped; a step that
was cut off goes on from its own newest checkpoint.
"""

import os

from tic_clip.cli import Parser, run
from tic_clip.methods import METHODS
from tic_clip.scales import SCALES
from tic_clip.timeline import BENCHMARKS
from tic_clip.training import Request, describe, make_plan, run_step


def main() -> None:
    """Parse the flags and train the step."""
    parser = Parser(__doc__)
    parser.add_argument("--benchmark", default="datacomp", help=f"one of {', '.join(BENCHMARKS)} (default: datacomp)")
    parser.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--scale", required=True, help=f"one of {', '.join(SCALES)}")
    parser.add_argument("--step", required=True, help="a step of the benchmark: python -m tic_clip.timeline BENCHMARK")
    parser.add_argument("--data_dir", required=True, help="the folder that holds tic/{dataset}/…")
    parser.add_argument("--output_dir", required=True, help="the run's folder, one for all its steps")
    parser.add_argument("--dataset_resampled", action="store_true", help="OpenCLIP's sampling with replacement")
    parser.add_argument("--samples_per_step", type=int, help="instead of the scale's")
    parser.add_argument("--model", help="an OpenCLIP architecture, instead of the scale's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--workers", type=int, help="loader processes a rank, instead of the scale's")
    parser.add_argument("--dry_run", action="store_true", help="print the step's plan and stop")
    args = vars(parser.parse_args())
    dry_run, resampled = args.pop("dry_run"), args.pop("dataset_resampled")
    request = Request(**args, resampled=resampled)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if dry_run:
        print(describe(make_plan(request, world_size)))
        return
    trained = run_step(request, rank=rank, world_size=world_size)
    if rank == 0 and not trained:
        print(f"{request.step}: done already")


if __name__ == "__main__":
    run(main)
