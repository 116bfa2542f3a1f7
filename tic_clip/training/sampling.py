"""Exact sampling as pure functions: which samples each rank and loader worker reads, in which order.

The samples of a source (a split) are laid out as an endless *line*: pass after pass, the shards of each in a seeded
order. A step reads the first n positions of each line, so every sample ⌊n / size⌋ or ⌈n / size⌉ times. The lines are
merged so that every stretch of the step holds the sources in proportion. The merged line is cut into blocks, ranks and
loader workers as consecutive ranges: which samples are read does not depend on the number of ranks or workers, and
training can resume after any block with other numbers.

Sampling with replacement divides a step in the same way, but draws the shards of a source (``draws``).
"""

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np


def apportion(weights: Iterable[int | Fraction], total: int) -> list[int]:
    """Split ``total`` into integers in proportion to ``weights``, by largest remainders (ties: the first)."""
    weights = list(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def interleave(counts: Sequence[int], starts: Sequence[int] | None = None) -> Iterator[int]:
    """Yield each source number i ``counts[i]`` times, evenly spread; skip its first ``starts[i]``.

    Item j of source i has the time (j + 1/2) / counts[i]; ties go to the earlier source.
    """
    end = 2 * math.lcm(*filter(None, counts))  # time 1 in units that make all times integers
    times = [
        zip(range((2 * start + 1) * end // (2 * count), end, end // count), itertools.repeat(i))
        for i, (count, start) in enumerate(zip(counts, starts or [0] * len(counts), strict=True))
        if count
    ]
    return (i for _, i in heapq.merge(*times))


def source_counts(quotas: Sequence[int], position: int) -> list[int]:
    """Return how many samples of each source are before ``position`` of the merged line, ``interleave(quotas)``."""
    total = sum(quotas)
    early = max(0, position - len(quotas))
    counts = [(2 * early * quota + total) // (2 * total) for quota in quotas]  # those at times up to early / total
    for i in itertools.islice(interleave(quotas, counts), position - sum(counts)):
        counts[i] += 1
    return counts


def source_ranges(
    plan: dict[str, Any], block: int, rank: int, world_size: int, worker: int, num_workers: int
) -> list[range]:
    """Return the positions on each source's line that a rank's loader worker reads in ``block`` (from 0).

    A rank takes its batches from its workers in turn.
    """
    first = (block * world_size + rank) * plan["block"]
    first += sum(len(range(w, plan["block"], num_workers)) for w in range(worker))
    last = first + len(range(worker, plan["block"], num_workers))
    quotas, batch_size = [source["samples"] for source in plan["sources"]], plan["batch_size"] // world_size
    starts, stops = (source_counts(quotas, batch * batch_size) for batch in (first, last))
    return list(map(range, starts, stops))


class Slice(NamedTuple):
    """Samples ``start`` … ``stop`` − 1 of shard number ``shard``, read in pass ``number`` over the source."""

    number: int
    shard: int
    start: int
    stop: int


def slices(sizes: np.ndarray, seed: tuple[int, ...], positions: range) -> Iterator[Slice]:
    """Yield the slices at ``positions`` of the line of a source with ``sizes`` (S,) samples in its shards."""
    total = int(sizes.sum())
    for number in range(positions.start // total, -(-positions.stop // total)):
        order = np.random.default_rng([*seed, number]).permutation(len(sizes))
        ends = np.cumsum(sizes[order])
        low, high = max(positions.start - number * total, 0), min(positions.stop - number * total, total)
        for i in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            begin = int(ends[i] - sizes[order[i]])
            if begin >= high:
                break
            yield Slice(number, int(order[i]), max(low - begin, 0), min(high, int(ends[i])) - begin)


def draws(sizes: np.ndarray, seed: tuple[int, ...], start: int) -> Iterator[Slice]:
    """Yield shards drawn with replacement, for ever: each is read from a random sample to its end, and then up to it.

    What is drawn depends on ``start``, the position on the line at which a loader worker begins.
    """
    rng = np.random.default_rng([*seed, start])
    for number in itertools.count(start):
        shard = int(rng.integers(len(sizes)))
        first = int(rng.integers(sizes[shard]))
        yield Slice(number, shard, first, int(sizes[shard]))
        if first:
            yield Slice(number, shard, 0, first)


def derive_seed(*parts: object) -> int:
    """Return a 64-bit seed that depends on all of ``parts`` and on nothing else."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def add_counts(*tables: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the sum of tables {source: {"read" or "undecodable": samples}}."""
    total = defaultdict(Counter)
    for table in tables:
        for source, counts in table.items():
            total[source].update(counts)
    return {source: dict(counts) for source, counts in total.items()}
