"""Train one time step with a continual method, or all of them one after the other, alone or under torchrun.

    python scripts/train.py --benchmark emoji --method cumulative --scale tic_tiny --step 2014 \\
        --data_dir data/emoji --output_dir results/emoji/cumulative
    torchrun --nproc-per-node 8 scripts/train.py --benchmark datacomp --method oracle --scale tic_large --step all \\
        --data_dir /data --output_dir /runs/oracle

Writes O/STEP/: plan.json first, checkpoints and logs, and done.json last. A step that is done is skipped; a step that
was cut off resumes from its own newest checkpoint. With --dry_run it prints the plan.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from tic_clip.cli import Parser, run_main
from tic_clip.training.config import add_flags, config_from
from tic_clip.training.plan import add_macs, describe, make_plan, steps_of
from tic_clip.training.step import check_ready, train_steps


def main(argv: Sequence[str] | None = None, world_size: int | None = None) -> None:
    """Train the steps, or print or check their plans for ``world_size`` ranks (default: those of this run)."""
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    parser.add_argument("--check", action="store_true", help="make the plan, and stop")
    args = parser.parse_args(argv)
    config = config_from(args)
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    steps = steps_of(config) if config.step == "all" else [config.step]
    if args.dry_run or args.check:
        plans = [make_plan(replace(config, step=step), world_size) for step in steps]
    if args.dry_run:
        print("\n".join(describe(add_macs(plan)) for plan in plans))
    elif args.check:
        check_ready(config)
    else:
        train_steps(config, steps, int(os.environ.get("RANK", "0")), world_size)


if __name__ == "__main__":
    run_main(main)
