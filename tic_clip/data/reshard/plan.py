"""Which sample goes where. Pure: the order is that of the pool, and only the last shard of a split is not full.

A plan is made of counts: where the rows (samples, one a copy) of a pool shard go depends on how many rows of the same
split the shards before it have, and on nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tic_clip import TicError


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``first`` to ``last`` (exclusive) of a pool shard go into the output shard ``number`` at byte ``offset``."""

    number: int
    first: int
    last: int
    offset: int = 0


def cut(start: int, count: int, shard_size: int) -> Iterator[Piece]:
    """Yield the pieces of ``count`` rows that come after ``start`` rows of the same split; offsets are left at 0."""
    row, end = start, start + count
    while row < end:
        number = row // shard_size
        stop = min((number + 1) * shard_size, end)
        yield Piece(number, row - start, stop - start)
        row = stop


class Cutter:
    """Cuts one split, pool shard by pool shard: ``rows`` so far, and the bytes in the output shard being filled."""

    def __init__(self, shard_size: int) -> None:
        self.shard_size, self.rows, self.offset = shard_size, 0, 0

    def place(self, sizes: np.ndarray) -> Iterator[Piece]:
        """Yield the pieces of a pool shard whose rows take ``sizes`` (R,) bytes each, with their offsets."""
        for piece in cut(self.rows, len(sizes), self.shard_size):
            if self.rows % self.shard_size == 0:
                self.offset = 0
            yield Piece(piece.number, piece.first, piece.last, self.offset)
            self.offset += int(sizes[piece.first : piece.last].sum())
            self.rows += piece.last - piece.first

    def skip(self, count: int) -> None:
        """Count the rows of a pool shard that was copied before; its last output shard must be finished."""
        self.rows += count

    @property
    def num_full(self) -> int:
        """Output shards that no later pool shard can change."""
        return self.rows // self.shard_size


def shard_counts(num_samples: int, shard_size: int) -> list[int]:
    """Samples in each output shard of a split."""
    full, rest = divmod(num_samples, shard_size)
    return [shard_size] * full + [rest] * (rest > 0)


def to_read(counts: np.ndarray, known: np.ndarray, finished: list[set[int]], shard_size: int) -> np.ndarray:
    """Which pool shards must be read (again): (N,) bool.

    Args:
        counts: (N, S) rows of each pool shard in each of S splits.
        known: (N,) bool, whether an earlier run counted the shard; after the first that it did not, all are read.
        finished: S sets of output shards that are written.
        shard_size: rows of an output shard.
    """
    read = ~np.logical_and.accumulate(known)
    ends = np.cumsum(counts, axis=0)
    for split, done in enumerate(finished):
        first = (ends[:, split] - counts[:, split]) // shard_size
        last = (ends[:, split] - 1) // shard_size
        missing = np.ones(int(last.max(initial=0)) + 2, np.int64)
        missing[[number for number in done if number < len(missing)]] = 0
        before = np.concatenate([[0], np.cumsum(missing)])
        read |= (counts[:, split] > 0) & (before[last + 1] > before[first])
    return read


def block(num_shards: int, parts: int, part: int) -> range:
    """The pool shards of one part: ``parts`` blocks in the pool's order whose sizes differ by one at most.

    Raises:
        TicError: there are more parts than shards, or no such part.
    """
    if not 1 <= parts <= num_shards:
        raise TicError(f"{parts} parts of {num_shards} pool shards: give from 1 to {num_shards} parts")
    if not 0 <= part < parts:
        raise TicError(f"there is no part {part}: the parts are 0 to {parts - 1}")
    return range(num_shards * part // parts, num_shards * (part + 1) // parts)
