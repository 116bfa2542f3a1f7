"""The table of learning rate schedules, and the rate of each iteration of a step from its plan.

Iterations are counted from 0. After a linear warm-up the rate is the peak times the schedule's shape; over the last
``cooldown`` iterations of a step it falls linearly to 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup
from tic_clip.benchmarks import Benchmark
from tic_clip.training.config import Config, Scale
from tic_clip.training.methods import Method

BRANCH = Path("checkpoints/before_cooldown.pt")  # in a step's folder: where the next one goes on, if it continues


def cosine(iteration: int, warmup: int, iterations: int) -> float:
    """Fall along half a cosine wave from 1 after the warm-up to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup)))


def constant(iteration: int, warmup: int, iterations: int) -> float:
    """Stay at 1."""
    return 1.0


def inverse_sqrt(iteration: int, warmup: int, iterations: int) -> float:
    """Fall as 1 / √iteration from 1 at the end of the warm-up, which sets the time scale."""
    scale = max(warmup, 1)
    return math.sqrt(scale / (scale + iteration - warmup))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A row of the table: ``shape`` maps (iteration, warm-up, iterations) to a share of the peak, after the warm-up.

    One that ``continues`` warms up once in a run, of which ``iteration`` and ``warmup`` are then; a step starts from
    the model that the last one had before its cool-down, with its optimizer.
    """

    shape: Callable[[int, int, int], float]
    cooldown: float = 0.0  # default share of a step
    continues: bool = False


SCHEDULES = {
    "cosine": Schedule(shape=cosine),
    "const": Schedule(shape=constant),
    "const-cooldown": Schedule(shape=constant, cooldown=0.2),
    "wsd": Schedule(shape=constant, cooldown=0.2, continues=True),
    "rsqrt": Schedule(shape=inverse_sqrt, cooldown=0.2, continues=True),
}
DEFAULT = "cosine"  # and that of plans without a schedule, which are of an earlier version


def check_rate(config: Config, benchmark: Benchmark, method: Method) -> None:
    """Raise a TicError for lists without a number for each step, and for a schedule that does not fit the method."""
    steps, name = len(benchmark.steps), config.schedule or DEFAULT
    schedule = lookup(SCHEDULES, "schedule", name)
    for flag, alone in (("budget", False), ("lr", True), ("warmup", True)):
        count = len(getattr(config, flag) or ())
        if count not in (0, steps) and not (count == 1 and alone):
            raise TicError(f"--{flag} has {count} numbers, {benchmark.name} has {steps} steps")
    if len(config.warmup or ()) > 1 and config.next_warmup is not None:
        raise TicError("--warmup has a number for each step: leave out --next_warmup")
    if config.cooldown is not None and not schedule.cooldown:
        others = ", ".join(key for key, row in SCHEDULES.items() if row.cooldown)
        raise TicError(f"{name} has no cool-down: --cooldown is for {others}")
    if schedule.continues and method.start != "last":
        goes_on = f"--schedule {name} goes on from the last step's model before its cool-down"
        raise TicError(f"{goes_on}, and {method.name} does not start from the last model: use const-cooldown")


def plan_rate(config: Config, scale: Scale, first: int, t: int, start: str | None) -> dict[str, Any]:
    """Return the learning rate settings of step ``t``, and whether it keeps the optimizer, as a part of a plan."""
    name, peaks = config.schedule or DEFAULT, config.lr or (scale.learning_rate,)
    warmups = config.warmup or (scale.warmup,)
    is_branch = SCHEDULES[name].continues and t > first
    next_warmup = 0 if is_branch and config.next_warmup is None else scale.next_warmup
    warmup = warmups[t] if warmups[1:] else next_warmup if start else warmups[0]
    of_first = warmups[first] if warmups[1:] else scale.next_warmup if config.init else warmups[0]
    keep_optimizer = is_branch if config.keep_optimizer is None else config.keep_optimizer
    return {
        "learning_rate": peaks[t % len(peaks)],  # one number, or one for each step
        "schedule": name,
        "warmup": warmup,
        "run_warmup": of_first if is_branch else warmup,
        "optimizer": "kept" if start and keep_optimizer else "fresh",
    }


def learning_rate(plan: dict[str, Any], iteration: int) -> float:
    """Return the learning rate at ``iteration`` of a step."""
    warmup, iterations, cooldown = plan["warmup"], plan["iterations"], plan.get("cooldown", 0)
    shape, place = SCHEDULES[plan.get("schedule", DEFAULT)].shape, plan.get("trunk", 0) + max(iteration, warmup)
    rate = plan["learning_rate"] * shape(place, plan.get("run_warmup", warmup), iterations)
    if iteration < warmup:
        rate = rate * (iteration + 1) / warmup
    return rate * min(1, (iterations - iteration) / cooldown) if cooldown else rate


def cooldown_blocks(share: float, blocks: int) -> int:
    """Return how many of a step's ``blocks``, at whose ends a checkpoint can be written, cool down; one stays."""
    return min(max(1, round(share * blocks)), blocks - 1) if share else 0


def branch_point(plan: dict[str, Any]) -> int | None:
    """Return the iteration where the cool-down begins and from which the next step continues, if it does."""
    continues = SCHEDULES[plan.get("schedule", DEFAULT)].continues and plan["cooldown"]
    return plan["iterations"] - plan["cooldown"] if continues else None
