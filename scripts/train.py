"""Train one or all time steps with a continual method: directly, under torchrun, or under srun with a task per GPU.

    python scripts/train.py --benchmark emoji --method cumulative --scale tic_tiny --step 2014 \\
        --data_dir data/emoji --output_dir results/emoji/cumulative
    torchrun --nproc-per-node 8 scripts/train.py --benchmark datacomp --method oracle --scale tic_large --step all \\
        --data_dir /data --output_dir /runs/oracle -- --torchcompile --grad-clip-norm 1

Flags after -- are OpenCLIP's own (docs/training.md).

Writes OUTPUT_DIR/STEP/: plan.json first, then checkpoints and logs, done.json last. Skips finished steps, and resumes
an interrupted step from its newest checkpoint. --dry_run prints the step's plan, or with "--step all" a table of all
steps.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.training.config import Config, add_flags, config_from
from tic_clip.training.plan import SETTINGS, add_macs, check_step, make_plan, shorten, steps_of
from tic_clip.training.step import check_ready, read_ranks, train_steps


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; OpenCLIP's own follow a ``--``."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    parser.add_argument("--check", action="store_true", help="check the plan and stop")
    args = parser.parse_args(words[:end])
    if others := words[end + 1 :]:
        args = parser.parse_args([*words[:end], f"--openclip_flags={args.openclip_flags} {shlex.join(others)}"])
    return args


def main(argv: Sequence[str] | None = None, world_size: int | None = None) -> None:
    """Train the steps, or print or check plans for ``world_size`` ranks (default: those of this run)."""
    args = parse_args(argv)
    config = config_from(args)
    rank, world_size = (0, world_size) if world_size else read_ranks(os.environ)
    if args.dry_run:
        plans = [add_macs(plan) for plan in check_plans(config, world_size)]
        table = f"{config.output_dir}: {describe(plans)}"
        print(table if config.step == "all" else json.dumps(plans[0], indent=2))
    elif args.check:
        check_plans(config, world_size)
        check_ready(config)
    else:
        train_steps(config, list_steps(config), rank, world_size)


def list_steps(config: Config) -> Sequence[str]:
    """Return the step, or all."""
    return steps_of(config) if config.step == "all" else [config.step]


def check_plans(config: Config, world_size: int) -> list[dict]:
    """Return the plans of a step or of all steps; raise a TicError if a run would refuse one."""
    configs = [replace(config, step=step) for step in list_steps(config)]
    plans = [make_plan(each, world_size) for each in configs]
    for each, plan in zip(configs, plans, strict=True):
        check_step(each, plan, dry_run=True)
    return plans


def describe(plans: Sequence[dict[str, Any]]) -> str:
    """Return a line for a run and a table with a line for each of its steps."""
    plan = plans[-1]
    facts = [plan[key] for key in ("benchmark", "filter", "method", "scale", "model")]
    facts += [f"{plan['sampling']} sampling", f"{plan['checkpoints']} checkpoints a step", f"seed {plan['seed']}"]
    facts += filter(None, [plan.get("precision"), " ".join(plan["openclip_flags"])])
    facts += [f"{SETTINGS.get(key, key)} {plan[key]}" for key in ("buffer", "coefficient", "schedule") if key in plan]
    facts += [f"{plan['samples_seen']:,} samples", f"{plan['macs_seen']:.2e} MACs"]
    columns = ("step", "samples", "iterations × batch", "MACs", "lr", "warm-up", "start", "trained on")
    rows = [columns, *map(describe_step, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([", ".join(facts), *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])


def describe_step(plan: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a step's line."""
    sources = [f"{source['name']} {source['share']:.1%}" for source in plan["sources"]]
    if len(sources) > 4:
        sources = [f"{len(sources)} splits: {sources[0]}", sources[1], "…", sources[-1]]
    parts = plan["layout"]["accum_freq"]
    return (
        plan["step"],
        f"{plan['samples']:,}",
        f"{plan['iterations']:,} × {plan['batch_size']:,}" + f" ({parts} passes)" * (parts > 1),
        f"{plan['macs']:.2e}",
        f"{plan['learning_rate']:g}" + f" down in {plan['cooldown']:,}" * (plan["cooldown"] > 0),
        f"{plan['warmup']:,}" + " (longer than the step)" * (plan["warmup"] > plan["iterations"]),
        shorten(plan["start"]) + " with its optimizer" * (plan["optimizer"] == "kept"),
        ", ".join(sources),
    )


if __name__ == "__main__":
    run_main(main)
