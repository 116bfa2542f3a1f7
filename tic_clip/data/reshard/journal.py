"""What a run has done so far, so that the next one does not do it again.

``{OUT}/.reshard/{part}/journal.json`` holds what each pool shard was found to hold, and the output shards that are
written, with their bytes. It is a memory only: what it lacks is done again, and gives the same bytes.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tic_clip import TicError
from tic_clip.storage import read_json, write_json


@dataclass(kw_only=True)
class Counts:
    """What one pool shard holds: samples ``read``, of them ``usable`` or ``dropped`` by reason, what was ``noted``, and
    of each split the ``samples`` and, with further copies, the ``rows``. ``fault``: why it can't be read.
    """

    read: int = 0
    usable: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    samples: list[int]
    rows: list[int]
    fault: str | None = None


@dataclass(kw_only=True)
class Journal:
    """``splits``: what each depends on; ``shards``: the pool's, as far as they were counted;
    ``written``: for each split, output shard -> bytes. It is saved to ``path``, or nowhere if that is None.
    """

    path: Any
    splits: list[dict[str, Any]]
    shards: list[Counts | None]
    written: list[dict[int, int]]
    wait: float = 0.0  # seconds before it is worth saving again

    @classmethod
    def empty(cls, path: object, splits: list[dict[str, Any]], num_shards: int) -> "Journal":
        """The journal of a run that has done nothing."""
        return cls(path=path, splits=splits, shards=[None] * num_shards, written=[{} for _ in splits])

    @classmethod
    def load(cls, path: object, splits: list[dict[str, Any]], num_shards: int) -> "Journal":
        """What is known of these splits; an empty journal if nothing is, or of other splits."""
        try:
            return cls._of(read_json(path), path, splits)
        except (TicError, KeyError, TypeError, ValueError, AttributeError):  # none, of other splits, of another version
            return cls.empty(path, splits, num_shards)

    @classmethod
    def _of(cls, saved: Any, path: object, splits: list[dict[str, Any]]) -> "Journal":
        order = [saved["splits"].index(split) for split in splits]
        shards = [counts and Counts(**counts) for counts in saved["shards"]]
        for counts in filter(None, shards):
            counts.samples, counts.rows = [[values[i] for i in order] for values in (counts.samples, counts.rows)]
        written = [{int(number): size for number, size in saved["written"][i].items()} for i in order]
        return cls(path=path, splits=splits, shards=shards, written=written)

    def save(self, *, now: bool = False) -> None:
        """Write it, unless that was done a moment ago: a twentieth of the time goes into it at most."""
        if self.path is None or (not now and time.monotonic() < self.wait):
            return
        start = time.monotonic()
        shards = [counts and asdict(counts) for counts in self.shards]
        write_json(self.path, {"splits": self.splits, "shards": shards, "written": self.written}, sync=False)
        end = time.monotonic()
        self.wait = end + 20 * (end - start)
