"""Which sample goes where. Pure: the order is that of the pool, and only the last shard of a split is not full."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tic_clip.reshard.index import Matches


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Samples of one pool shard, in its order: positions in it, UIDs, and which copy of the UID each is; all (N,)."""

    source: str
    samples: np.ndarray
    uids: np.ndarray
    copies: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output shard: its number in the split and the pieces that it is made of."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return sum(len(piece.samples) for piece in self.pieces)


def repeat(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """One row a copy: indices into ``matches``, and the number of the copy, counted from 0 for each UID."""
    rows = np.repeat(np.arange(len(matches.samples)), matches.copies)
    first = np.repeat(np.cumsum(matches.copies) - matches.copies, matches.copies)
    return rows, np.arange(len(rows)) - first


def cut(sources: Iterable[str], matches: Iterable[Matches], shard_size: int) -> Iterator[Shard]:
    """Yield the output shards of one subset, from its matches with each pool shard of ``sources`` in their order."""
    number, room, pieces = 0, shard_size, []
    for source, found in zip(sources, matches, strict=True):
        rows, copies = repeat(found)
        start = 0
        while start < len(rows):
            stop = min(start + room, len(rows))
            part = rows[start:stop]
            pieces.append(
                Piece(source=source, samples=found.samples[part], uids=found.uids[part], copies=copies[start:stop])
            )
            room -= stop - start
            start = stop
            if room == 0:
                yield Shard(number=number, pieces=tuple(pieces))
                number, room, pieces = number + 1, shard_size, []
    if pieces:
        yield Shard(number=number, pieces=tuple(pieces))
