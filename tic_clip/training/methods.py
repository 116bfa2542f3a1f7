"""What a continual method trains on, starts from and spends at a step. Pure: a method is one row of a table.

Steps are counted from 0 here; at step t a method sees the steps 0 … t. C is the scale's samples per step, D the
samples that are new at the step. A method says how many samples of each step it trains on; of these one is as likely as
another.
``docs/adding_a_method.md`` adds one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from tic_clip import TicError, lookup
from tic_clip.training.patching import patch
from tic_clip.training.sampling import apportion


def everything(sizes: Sequence[int], buffer: Fraction) -> list[int]:
    """All samples of all steps so far."""
    return list(sizes)


def new_only(sizes: Sequence[int], buffer: Fraction) -> list[int]:
    """The samples that are new at the step."""
    return [0] * (len(sizes) - 1) + [sizes[-1]]


def halved(sizes: Sequence[int], buffer: Fraction) -> list[int]:
    """The new samples and a buffer of old ones, halved with each step back: 1/2, 1/4, … and the last share again."""
    old = len(sizes) - 1
    return _with_buffer(sizes, buffer, [Fraction(1, 2 ** min(old - i, max(old - 1, 0))) for i in range(old)])


def equal(sizes: Sequence[int], buffer: Fraction) -> list[int]:
    """The new samples and a buffer of old ones, shared equally among the earlier steps."""
    old = len(sizes) - 1
    return _with_buffer(sizes, buffer, [Fraction(1, max(old, 1))] * old)


def _with_buffer(sizes: Sequence[int], buffer: Fraction, shares: list[Fraction]) -> list[int]:
    """``buffer`` · D old samples in these shares and all new ones; all old ones where the buffer holds them.

    Raises:
        TicError: the buffer has less room than the earlier steps' samples, but more for one step than that step has.
    """
    *old, new = sizes
    room = int(buffer * new)
    if room >= sum(old):
        return list(sizes)
    kept = apportion(shares, room)
    for i, (count, size) in enumerate(zip(kept, old, strict=True)):
        if count > size:
            raise TicError(
                f"a buffer of {room} samples would hold {count} of step {i + 1}, which has {size}: "
                "give a smaller --buffer"
            )
    return [*kept, new]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: the samples of each step so far that it uses, where it starts, how many times C, and what is special.

    ``data`` maps the sizes of the steps 0 … t and the buffer in units of D to samples used of each. ``finish``, if
    given, makes the step's model after training: it gets the plan and the step's folder, returns the file and facts.
    """

    name: str
    data: Callable[[Sequence[int], Fraction], list[int]]
    start: Literal["random", "last", "last patched"]
    budget: Literal["fixed", "growing"] = "fixed"  # C a step, or C for each step so far
    teacher: bool = False  # OpenCLIP's distillation from the last model
    finish: Callable[[dict[str, Any], Path], dict[str, Any]] | None = None
    hold_out: bool = False  # part of the data for ``finish`` to choose the coefficient on

    @property
    def has_buffer(self) -> bool:
        """Whether the size of the buffer matters."""
        return self.data in (halved, equal)

    def starts_from(self, t: int) -> int | None:
        """The step whose model step ``t`` starts from, or None for random weights."""
        return None if self.start == "random" or t == 0 else t - 1

    def budget_of(self, t: int) -> int:
        """What step ``t`` spends, in units of C."""
        return t + 1 if self.budget == "growing" else 1


METHODS = {
    method.name: method
    for method in (
        Method(name="oracle", data=everything, start="random", budget="growing"),
        Method(name="cumulative", data=everything, start="last"),
        Method(name="cumulative-exp", data=halved, start="last"),
        Method(name="cumulative-equal", data=equal, start="last"),
        Method(name="sequential", data=new_only, start="last"),
        Method(name="restart", data=everything, start="random"),
        Method(name="patching", data=new_only, start="last patched", finish=patch, hold_out=True),
        Method(name="lwf", data=new_only, start="last", teacher=True),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``; a ``TicError`` names those that exist."""
    return lookup(METHODS, "method", name)
