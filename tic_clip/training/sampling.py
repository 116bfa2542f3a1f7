"""Exact sampling: over a step a sample is read ⌊n⌋ or ⌈n⌉ times, n = its source's share of the budget / its size.

Each source (a split) is laid out as an endless *line*: pass after pass over its samples, the shards of each pass in a
seeded order. A step reads the first ``samples`` positions of each line; the lines are merged so that every stretch of
the step holds the sources in proportion. The merged line is cut into blocks, these into ranks, these into loader
workers: consecutive ranges, so the samples read do not depend on the number of ranks or workers, and a shard is cut
wherever a range ends. Training can stop after any block and go on there. The first half of this file is that plan,
pure; the second half reads what it says.
"""

import heapq
import io
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np

from tic_clip import TicError
from tic_clip.data.split import split_sizes
from tic_clip.data.tar import IMAGES, UNUSABLE, open_shard, samples

T = TypeVar("T")

SHUFFLE_SIZE = 5000  # samples held by one loader worker, over all sources; OpenCLIP's figure
SHUFFLE_INITIAL = 1000  # of these, read before the first one is given out


def apportion(weights: Iterable[int | Fraction], total: int) -> list[int]:
    """Split ``total`` in proportion to ``weights`` into integers, by largest remainders (ties: the first)."""
    weights = list(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def counts_before(quotas: list[int], position: int) -> list[int]:
    """How many samples of each source stand before ``position`` in the merged line.

    The j-th sample of a source with quota q stands at time (j + 1/2) / q; ties go to the earlier source. So the counts
    grow with the position one by one, reach the quotas at its end, and are proportional to them throughout.
    """
    total = sum(quotas)
    start = max(0, position - len(quotas))
    counts = [(2 * start * quota + total) // (2 * total) for quota in quotas]  # a few short
    waiting = [(Fraction(2 * n + 1, 2 * q), i) for i, (n, q) in enumerate(zip(counts, quotas, strict=True)) if n < q]
    heapq.heapify(waiting)
    for _ in range(position - sum(counts)):
        _, i = heapq.heappop(waiting)
        counts[i] += 1
        if counts[i] < quotas[i]:
            heapq.heappush(waiting, (Fraction(2 * counts[i] + 1, 2 * quotas[i]), i))
    return counts


def worker_range(batches: int, batch_size: int, rank: int, worker: int, num_workers: int) -> tuple[int, int]:
    """The positions in a block that one loader worker reads.

    Args:
        batches: batches that each rank takes in the block; the loader takes them from its workers in turn.
        batch_size: of one rank.
        rank: of the process.
        worker: number of the loader worker, 0 … num_workers − 1.
        num_workers: of each rank.
    """
    first = rank * batches + sum(len(range(w, batches, num_workers)) for w in range(worker))
    return first * batch_size, (first + len(range(worker, batches, num_workers))) * batch_size


@dataclass(frozen=True, slots=True)
class Slice:
    """Samples ``start`` … ``stop`` − 1 of shard number ``shard``, read in pass ``number`` over the source."""

    number: int
    shard: int
    start: int
    stop: int


def line(sizes: np.ndarray, seed: tuple[int, ...], start: int, stop: int) -> Iterator[Slice]:
    """The slices at positions ``start`` … ``stop`` − 1 of a source's line; its shards hold ``sizes`` samples."""
    total = int(sizes.sum())
    for number in range(start // total, -(-stop // total)):
        order = np.random.default_rng([*seed, number]).permutation(len(sizes))
        ends = np.cumsum(sizes[order])
        low, high = max(start - number * total, 0), min(stop - number * total, total)
        for i in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            begin = int(ends[i] - sizes[order[i]])
            if begin >= high:
                break
            yield Slice(number, int(order[i]), max(low - begin, 0), min(high, int(ends[i])) - begin)


def turns(blocks: range, batches: int, worker: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """(block, place of this loader worker in it) for blocks in a row: the loader goes on taking turns between them.

    What is in a batch depends on the place, so a block is the same wherever the row began.
    """
    for block in blocks:
        yield block, (worker - (block - blocks.start) * batches) % num_workers


def heads(sizes: Iterable[int], used: int) -> list[int]:
    """How many of the first samples of each shard make ``used`` of all; the tails are left to others."""
    return apportion(sizes, used)


def seed_of(*parts: object) -> int:
    """A 64-bit seed that depends on all of ``parts`` and on nothing else."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def shuffled(items: Iterable[T], size: int, initial: int, rng: random.Random) -> Iterator[T]:
    """Yield ``items`` in random order through a buffer that starts at ``initial`` items and grows to ``size``."""
    items, buffer = iter(items), []
    for item in items:
        buffer.append(item)
        if len(buffer) < size:
            buffer.extend(itertools.islice(items, 1))
        if len(buffer) >= min(initial, size):
            yield _pop(buffer, rng)
    while buffer:
        yield _pop(buffer, rng)


def _pop(buffer: list[T], rng: random.Random) -> T:
    i = rng.randrange(len(buffer))
    buffer[i], buffer[-1] = buffer[-1], buffer[i]
    return buffer.pop()


# What follows reads files and decodes.


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split as the step reads it: its shards, the samples used of each, and how many the step takes from it."""

    name: str
    shards: tuple[str, ...]
    sizes: np.ndarray
    samples: int


@dataclass(frozen=True, kw_only=True)
class Raw:
    """An undecoded sample, and a seed that is its own at this position of the line."""

    image: bytes | None
    text: bytes | None
    seed: int
    shard: str
    key: str
    among: int  # samples of the slice that it was read in


def read_slice(path: str, piece: Slice, seed: tuple[int, ...]) -> Iterator[Raw]:
    """Yield the samples of one slice of the shard at ``path``.

    Raises:
        TicError: the shard can't be read or has fewer samples than its table says.
    """
    count = 0
    with open_shard(path) as shard:
        for i, sample in enumerate(itertools.islice(samples(shard), piece.stop)):
            if i < piece.start:
                continue
            image = next((suffix for suffix in IMAGES if suffix in sample.members), None)
            yield Raw(
                image=sample.read(shard, image) if image else None,
                text=sample.read(shard, "txt") if "txt" in sample.members else None,
                seed=seed_of(seed, piece.number, piece.shard, i),
                shard=path,
                key=sample.key,
                among=piece.stop - piece.start,
            )
            count += 1
    if count != piece.stop - piece.start:
        raise TicError(f"{path} has only {piece.start + count} samples, its sizes.json says at least {piece.stop}")


def read_line(source: Source, seed: tuple[int, ...], start: int, stop: int, buffer: int) -> Iterator[Raw]:
    """Yield the samples at positions ``start`` … ``stop`` − 1 of a source's line, shuffled within each pass."""
    for number, pieces in itertools.groupby(line(source.sizes, seed, start, stop), key=lambda piece: piece.number):
        raw = itertools.chain.from_iterable(read_slice(source.shards[piece.shard], piece, seed) for piece in pieces)
        yield from shuffled(raw, buffer, min(buffer, SHUFFLE_INITIAL), random.Random(seed_of(seed, number, start)))


def reason_of(raw: Raw) -> str:
    """Why a sample that ``decode`` refused is left out."""
    return "no image" if raw.image is None else "no text" if raw.text is None else "undecodable"


def decode(raw: Raw, preprocess: Callable, tokenizer: Callable) -> tuple[Any, Any]:
    """(image tensor, token tensor) of a sample; its augmentation is seeded by its place, not by its worker.

    Raises:
        ValueError: image or caption is missing. OSError, SyntaxError: the image can't be decoded.
    """
    import torch
    from PIL import Image

    if raw.image is None or raw.text is None:
        raise ValueError(reason_of(raw))
    torch.default_generator.manual_seed(raw.seed)  # torch.manual_seed asks every device, which costs 0.2 ms
    random.seed(raw.seed)
    np.random.seed(raw.seed & 0xFFFFFFFF)
    image = preprocess(Image.open(io.BytesIO(raw.image)).convert("RGB"))
    return image, tokenizer(raw.text.decode())[0]


def decoded(
    source: Source, seed: tuple[int, ...], start: int, stop: int, buffer: int, transforms: tuple, tally: Counter
) -> Iterator[tuple[Any, Any]]:
    """Exactly ``stop`` − ``start`` decoded samples of a source; one that can't be decoded is replaced from its range.

    ``tally`` counts (source, "read") and (source, reason to leave out).

    Raises:
        TicError: none of a shard, or none of the range, can be decoded.
    """
    need, bad_of = stop - start, Counter()
    while need:
        before = need
        for raw in read_line(source, seed, start, stop, buffer):
            try:
                item = decode(raw, *transforms)
            except UNUSABLE as error:
                if not bad_of:
                    logging.warning("%s:%s is left out: %s", raw.shard, raw.key, error)
                bad_of[raw.shard] += 1
                tally[source.name, reason_of(raw)] += 1
                if bad_of[raw.shard] == raw.among:
                    check_shard(source, raw.shard, transforms)
                continue
            need -= 1
            tally[source.name, "read"] += 1
            yield item
            if not need:
                return
        if need == before:
            raise TicError(f"{source.name}: no sample can be used ({dict(tally)})")


def check_shard(source: Source, path: str, transforms: tuple) -> None:
    """Look for a sample that can be decoded in a shard of which a whole slice could not.

    Raises:
        TicError: there is none.
    """
    size, reasons = int(source.sizes[source.shards.index(path)]), Counter()
    for raw in read_slice(path, Slice(0, 0, 0, size), (0,)):
        try:
            decode(raw, *transforms)
        except UNUSABLE:
            reasons[reason_of(raw)] += 1
        else:
            return
    raise TicError(f"{path}: no sample of this shard can be used ({dict(reasons)})")


def merged(streams: list[Iterator[T]], counts: list[int]) -> Iterator[T]:
    """Interleave ``counts[i]`` items of each stream in proportion, from the first item to the last."""
    for _, i in heapq.merge(*(_times(count, i) for i, count in enumerate(counts))):
        yield next(streams[i])


def _times(count: int, i: int) -> Iterator[tuple[float, int]]:
    for j in range(count):
        yield (j + 0.5) / count, i


def sources_of(plan: dict[str, Any]) -> list[Source]:
    """The sources of a ``plan.json``, with the shards and sizes that are on disk now.

    Raises:
        TicError: a split is not the size that the plan was made for.
    """
    sources = []
    for entry in plan["sources"]:
        sizes = split_sizes(entry["split"])
        if sum(sizes.values()) != entry["size"]:
            raise TicError(f"{entry['split']} has {sum(sizes.values())} samples, the plan says {entry['size']}")
        used = dict(zip(sizes, heads(sizes.values(), entry["used"]), strict=True))
        shards = tuple(path for path in used if used[path])
        sources.append(
            Source(
                name=entry["name"],
                shards=shards,
                sizes=np.array([used[path] for path in shards], dtype=np.int64),
                samples=entry["samples"],
            )
        )
    return sources


def stream(
    plan: dict[str, Any],
    sources: list[Source],
    block: int,
    rank: int,
    world_size: int,
    place: int,
    num_workers: int,
    transforms: tuple,
    tally: Counter,
) -> Iterator[tuple[Any, Any]]:
    """The decoded samples of ``block`` (from 0) that the loader worker at ``place`` of one rank reads."""
    quotas = [source.samples for source in sources]
    first, last = worker_range(plan["block"], plan["batch_size"] // world_size, rank, place, num_workers)
    offset = block * plan["block"] * plan["batch_size"]
    starts, stops = counts_before(quotas, offset + first), counts_before(quotas, offset + last)
    counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
    streams = [
        decoded(
            source,
            (plan["seed"], seed_of(plan["step"], source.name) >> 32),
            starts[i],
            stops[i],
            max(1, SHUFFLE_SIZE * counts[i] // max(1, sum(counts))),
            transforms,
            tally,
        )
        for i, source in enumerate(sources)
    ]
    yield from merged(streams, counts)
