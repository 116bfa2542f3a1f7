"""Train one time step with a continual method, alone or under torchrun.

    python scripts/train.py --benchmark emoji --method cumulative --scale tic_tiny --step 2014 \\
        --data_dir data/emoji --output_dir results/emoji/cumulative

Writes O/STEP/: plan.json first, checkpoints and logs, and done.json last. A step that is done is skipped; a step that
was cut off goes on from its own newest checkpoint. With --dry_run, "--step all" prints the plan of every step.
"""

import os
from dataclasses import replace

from tic_clip import TicError
from tic_clip.cli import Parser, run_main
from tic_clip.training.config import add_flags, config_from
from tic_clip.training.plan import add_macs, describe, make_plan, steps_of
from tic_clip.training.step import check_ready, fetch_copy, run_step


def main() -> None:
    """Train the step, or print the plan."""
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the step's plan and stop")
    parser.add_argument("--check", action="store_true", help="make the step's plan, get its --remote copy, and stop")
    args = parser.parse_args()
    config = config_from(args)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    steps = steps_of(config) if config.step == "all" else [config.step]
    if args.dry_run or args.check:
        plans = [make_plan(replace(config, step=step), world_size) for step in steps]
    if args.dry_run:
        print("\n".join(describe(add_macs(plan)) for plan in plans))
        return
    if args.check:
        check_ready(config)
        if config.step != "all":
            fetch_copy(config, plans[0])
        return
    if config.step == "all":
        raise TicError("--step all is for --dry_run; scripts/loop.sh trains step after step")
    trained = run_step(config, rank=rank, world_size=world_size)
    if rank == 0 and not trained:
        print(f"{config.step}: done already")


if __name__ == "__main__":
    run_main(main)
