"""Train one time step with a continual method, alone or under torchrun.

    python scripts/train.py --benchmark emoji --method cumulative --scale tic_tiny --step 2014 \\
        --data_dir data/emoji --output_dir results/emoji/cumulative

Writes O/STEP/: plan.json first, checkpoints and logs, and done.json last. A step that is done is skipped; a step that
was cut off goes on from its own newest checkpoint. With --dry_run, "--step all" prints the plan of every step.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS
from tic_clip.cli import Parser, run_main
from tic_clip.training.methods import METHODS
from tic_clip.training.plan import Request, add_macs, describe, make_plan, parse_budget, steps_of
from tic_clip.training.scales import POLICIES, SCALES
from tic_clip.training.step import check_ready, fetch_copy, run_step


def parse() -> argparse.Namespace:
    """The flags; their names are the fields of ``Request``."""
    parser = Parser(__doc__)
    parser.add_argument("--benchmark", default="datacomp", help=f"one of {', '.join(BENCHMARKS)} (default: datacomp)")
    parser.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--scale", required=True, help=f"one of {', '.join(SCALES)}")
    parser.add_argument("--step", required=True, help="a step: python -m tic_clip.benchmarks BENCHMARK")
    parser.add_argument("--data_dir", required=True, help="the folder or URL that holds tic/{dataset}/…")
    parser.add_argument("--output_dir", required=True, help="the run's folder, one for all its steps")
    parser.add_argument("--filter", help="of datacomp's training data: basic or bestpool (default: basic)")
    parser.add_argument("--dataset_resampled", dest="resampled", action="store_true", help="sample with replacement")
    parser.add_argument("--samples_per_step", type=int, help="C, the samples that a step spends (default: the scale's)")
    parser.add_argument("--batch_size", type=int, help="the global batch, of all processes (default: the scale's)")
    parser.add_argument("--budget", help="what each step spends, in units of C: 1,1,1.5,2 (default: the method's)")
    parser.add_argument(
        "--buffer", type=float, help="old data of cumulative-exp, -equal, in units of the new (default: 1)"
    )
    parser.add_argument("--weights", help='JSON {"step": {"split": share of the samples, …}, …}; the shares sum to 1')
    parser.add_argument("--init", help="a checkpoint to start from (default: random weights)")
    parser.add_argument("--first_step", help="the first step to train, from --init (default: the benchmark's first)")
    parser.add_argument("--policy", help=f"how a later step begins: {', '.join(POLICIES)} (default: the scale's)")
    parser.add_argument("--coefficient", type=float, help="of patching, 0 to 1 (default: chosen on held-out data)")
    parser.add_argument("--model", help="an OpenCLIP architecture, such as ViT-B-32 (default: the scale's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--workers", type=int, help="loader processes a rank (default: the scale's)")
    parser.add_argument("--block", type=int, help="iterations between places to go on from (default: the scale's)")
    parser.add_argument("--max_kept", type=int, help="checkpoints of a step that stay here (default: the scale's)")
    parser.add_argument("--save_every", type=int, help="samples between two checkpoints (default: by --save_minutes)")
    parser.add_argument("--save_minutes", type=float, default=10, help="minutes between two checkpoints (default: 10)")
    parser.add_argument("--report_to", default="", help="tensorboard, wandb or tensorboard,wandb (default: neither)")
    parser.add_argument("--remote", help="a URL or folder for copies of the checkpoints (default: none)")
    parser.add_argument("--dry_run", action="store_true", help="print the step's plan and stop")
    parser.add_argument("--check", action="store_true", help="make the step's plan, get its --remote copy, and stop")
    return parser.parse_args()


def main() -> None:
    """Train the step, or print the plan."""
    args = vars(parse())
    dry_run, check = args.pop("dry_run"), args.pop("check")
    args["budget"] = parse_budget(args["budget"]) if args["budget"] else None
    request = Request(**args)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    steps = steps_of(request) if request.step == "all" else [request.step]
    if dry_run:
        show(request, world_size, steps)
        return
    if check:
        plans = [make_plan(replace(request, step=step), world_size) for step in steps]
        check_ready(request)
        if request.step != "all":
            fetch_copy(request, plans[0])
        return
    if request.step == "all":
        raise TicError("--step all is for --dry_run; scripts/loop.sh trains step after step")
    trained = run_step(request, rank=rank, world_size=world_size)
    if rank == 0 and not trained:
        print(f"{request.step}: done already")


def show(request: Request, world_size: int, steps: Sequence[str]) -> None:
    """Print the plans of steps."""
    plans = [make_plan(replace(request, step=step), world_size) for step in steps]

    print("\n".join(describe(add_macs(plan)) for plan in plans))


if __name__ == "__main__":
    run_main(main)
