"""The classes of a table with a column of labels."""

from collections import Counter, defaultdict
from typing import Any

from tic_clip import TicError


class Labels:
    """Counts the samples of each class, and which classes each period's test list has."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.periods: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, split: str, step: str, label: str) -> None:
        """Add a sample of a list; one without a label is of no class."""
        if label:
            self.counts[label] += 1
            if split == "test":
                self.periods[step].add(label)

    def facts(self, periods: tuple[str, ...]) -> dict[str, Any]:
        """Return their part of the manifest: class -> samples, sorted, and period -> classes without a test sample."""
        if not self.counts:
            raise TicError("the column of labels is empty")
        missing = {period: len(self.counts) - len(self.periods[period]) for period in periods}
        return {"classes": dict(sorted(self.counts.items())), "missing_classes": missing}
