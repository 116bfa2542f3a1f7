"""What a continual method trains on, starts from and spends at a step. Pure: a method is one row of a table.

Steps are counted from 0 here; at step t a method sees the steps 0 … t. C is the scale's samples per step.
"""

from dataclasses import dataclass
from typing import Literal

from tic_clip import pick


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: which steps' data, which start, how many times C."""

    name: str
    data: Literal["all", "new"]  # all the data up to the step, or only what is new in it
    start: Literal["random", "last"]  # random weights, or the last step's model
    budget: Literal["fixed", "growing"]  # C a step, or C for each step so far

    def steps(self, t: int) -> range:
        """The steps whose data step ``t`` trains on; within them a sample is as likely as any other."""
        return range(t if self.data == "new" else 0, t + 1)

    def starts_from(self, t: int) -> int | None:
        """The step whose model step ``t`` starts from, or None for random weights."""
        return t - 1 if self.start == "last" and t > 0 else None

    def samples(self, t: int, samples_per_step: int) -> int:
        """The samples that step ``t`` sees."""
        return samples_per_step * (t + 1 if self.budget == "growing" else 1)


METHODS = {
    method.name: method
    for method in (
        Method(name="cumulative", data="all", start="last", budget="fixed"),
        Method(name="sequential", data="new", start="last", budget="fixed"),
        Method(name="oracle", data="all", start="random", budget="growing"),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``; a ``TicError`` names those that exist."""
    return pick(METHODS, "method", name)
