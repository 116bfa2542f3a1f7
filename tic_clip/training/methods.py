"""The table of continual methods: what each trains on, starts from and spends at a step.

Steps are counted from 0. C is the scale's samples per step, D the number of samples that are new at step t.
docs/adding_a_method.md adds one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from tic_clip.training.sampling import apportion

PATCHED = Path("checkpoints/patched.pt")  # what a step's ending makes of its last checkpoint, in the step's folder


def held_out(size: int) -> int:
    """Return how many of a split's ``size`` samples are held out to choose patching's coefficient."""
    return min(size // 20, 2_000)


def all_data(sizes: Sequence[int], replay: Fraction) -> list[int]:
    """Use all samples of all steps so far."""
    return list(sizes)


def new_data(sizes: Sequence[int], replay: Fraction) -> list[int]:
    """Use the samples that are new at the step."""
    return [0] * (len(sizes) - 1) + [sizes[-1]]


def exponential_replay(sizes: Sequence[int], replay: Fraction) -> list[int]:
    """Use the new samples and old ones: 1/2 of those from the last step, then 1/4, …, and the last share twice."""
    return _with_replay(sizes, replay, [2 ** max(i - 1, 0) for i in range(len(sizes) - 1)])


def equal_replay(sizes: Sequence[int], replay: Fraction) -> list[int]:
    """Use the new samples and equally many old ones of each earlier step."""
    return _with_replay(sizes, replay, [1] * (len(sizes) - 1))


def _with_replay(sizes: Sequence[int], replay: Fraction, weights: list[int]) -> list[int]:
    """Use the new samples and ``replay`` · D old ones in proportion to ``weights``, or all if they are fewer.

    A step smaller than its share is used in full; the others share the rest.
    """
    *old, new = sizes
    room = int(replay * new)
    if room >= sum(old):
        return list(sizes)
    counts, weights = [0] * len(old), list(weights)
    while True:
        shares = apportion(weights, room - sum(counts))
        small = [i for i, size in enumerate(old) if shares[i] > size]
        if not small:
            return [*map(sum, zip(counts, shares, strict=True)), new]
        for i in small:
            counts[i], weights[i] = old[i], 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table: what a step trains on, where it starts and what it spends.

    ``data`` maps the sizes of steps 0 … t, and the number of old samples in units of D, to the samples used of each.
    """

    name: str
    data: Callable[[Sequence[int], Fraction], list[int]]
    start: Literal["random", "last", "last patched"]
    budget: Literal["fixed", "growing"] = "fixed"  # C a step, or C for each step so far
    has_replay: bool = False  # the number of old samples matters
    teacher: bool = False  # OpenCLIP's distillation from the last model
    hold_out: bool = False  # part of the data, to choose a coefficient on after training
    anchor: bool = False  # a term of the loss for the last model, from its Fisher information
    weight: float | None = None  # of the loss's term for the last model
    all_checkpoints: bool = False  # the step's model is made of all its checkpoints


METHODS = {
    method.name: method
    for method in (
        Method(name="oracle", data=all_data, start="random", budget="growing"),
        Method(name="cumulative", data=all_data, start="last"),
        Method(name="cumulative-exp", data=exponential_replay, start="last", has_replay=True),
        Method(name="cumulative-equal", data=equal_replay, start="last", has_replay=True),
        Method(name="sequential", data=new_data, start="last"),
        Method(name="restart", data=all_data, start="random"),
        Method(name="patching", data=new_data, start="last patched", hold_out=True),
        Method(name="lwf", data=new_data, start="last", teacher=True, weight=1.0),
        Method(name="ewc", data=new_data, start="last", anchor=True, weight=10.0),
        Method(name="averaging", data=all_data, start="last", all_checkpoints=True),
    )
}
