"""A torch loader that reads and decodes what ``sampling`` plans, block by block, for OpenCLIP's training loop."""

import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import webdataset
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import RandomResizedCrop

from tic_clip import TicError
from tic_clip.cache import Cache, open_cache
from tic_clip.data.decode import decode_image, decode_tensor
from tic_clip.data.split import split_sizes
from tic_clip.data.tar import IMAGES, UNUSABLE, open_shard, samples
from tic_clip.parallel import iterate_batches
from tic_clip.training import sampling
from tic_clip.training.sampling import Slice, add_counts, derive_seed

Item = tuple[Any, Any]  # an image and its tokens
Counts = dict[str, Counter]  # source -> samples that were "read" and "undecodable"
SHUFFLE_SIZE, SHUFFLE_INITIAL = 5000, 1000  # samples that a loader worker holds, and reads first; OpenCLIP's figures


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split as a step reads it: the first ``sizes`` (S,) samples of its shards."""

    name: str
    seed: tuple[int, int]
    shards: list[str]
    sizes: np.ndarray
    keep: dict[str, Any]  # the plan's, which says if there is a cache
    with_replacement: bool = False

    @property
    def cache(self) -> Cache | None:
        """Return this process's cache."""
        return open_cache(self.keep)

    def passes(self, positions: range) -> Iterable[Iterable[Slice]]:
        """Return the slices at ``positions`` of the line, by pass; sampling with replacement is one endless pass."""
        if self.with_replacement:
            return [sampling.draws(self.sizes, self.seed, positions.start)]
        line = sampling.slices(self.sizes, self.seed, positions)
        return (pieces for _, pieces in itertools.groupby(line, key=lambda piece: piece.number))

    def prefetch(self, positions: range) -> None:
        """Fetch the first shard of ``positions`` in the background, if there is a cache."""
        if self.cache and positions:
            piece = next(iter(next(iter(self.passes(positions)))))
            self.cache.prefetch(self.shards[piece.shard])


def read_sources(plan: dict[str, Any]) -> list[Source]:
    """Return the sources of a plan with their shards."""
    sources, options = [], {"keep": plan.get("keep", {}), "with_replacement": plan.get("sampling") == "resampled"}
    for entry in plan["sources"]:
        table = split_sizes(entry["split"])
        sizes = np.fromiter(table.values(), np.int64, len(table))
        if entry["used"] < sizes.sum():
            sizes = np.array(sampling.apportion(table.values(), entry["used"]), dtype=np.int64)
        shards = list(itertools.compress(table, sizes.tolist()))
        seed = (plan["seed"], derive_seed(plan["step"], entry["name"]) >> 32)
        sources.append(Source(name=entry["name"], seed=seed, shards=shards, sizes=sizes[sizes > 0], **options))
    return sources


class RawSample(NamedTuple):
    """An undecoded sample."""

    image: bytes | None
    text: bytes | None
    seed: int  # its own in this pass
    name: str  # where it is


def read_slice(path: str, piece: Slice, seed: tuple[int, ...], cache: Cache | None = None) -> Iterator[RawSample]:
    """Yield the samples of a slice of the shard at ``path``."""
    i = piece.start
    with open_shard(path, cache.open if cache else None) as shard:
        for sample in itertools.islice(samples(shard), piece.start, piece.stop):
            image = next((sample.read(shard, suffix) for suffix in IMAGES if suffix in sample.members), None)
            text = sample.read(shard, "txt") if "txt" in sample.members else None
            yield RawSample(image, text, derive_seed(seed, piece.number, piece.shard, i), f"{path}:{sample.key}")
            i += 1
    if i < piece.stop:
        raise TicError(f"{path} has fewer samples than its sizes.json says: count them again with add_sizes.py")


def read_line(source: Source, positions: range, buffer_size: int) -> Iterator[RawSample]:
    """Yield the samples at ``positions`` of a source's line, shuffled within each pass."""
    shards, cache = source.shards, source.cache
    for number, pieces in enumerate(source.passes(positions), positions.start // int(source.sizes.sum())):
        if cache:  # it fetches the shard of the next slice while one is read
            pieces = cache.ahead(pieces, lambda piece: shards[piece.shard])
        raw = (sample for piece in pieces for sample in read_slice(shards[piece.shard], piece, source.seed, cache))
        rng = random.Random(derive_seed(source.seed, number, positions.start))
        yield from webdataset.shuffle(buffer_size, SHUFFLE_INITIAL, rng=rng)(raw)


def image_functions(backend: str, preprocess: Any, device: Any = "cpu") -> tuple[Callable, Callable]:
    """Return a function from an image's bytes to a tensor, and one from a batch of these to the model's input.

    "pil" is OpenCLIP's transform ``preprocess``. "torchvision" takes the same crops, resizes them as bytes and
    normalises them on ``device``.
    """
    if backend == "pil":
        return (lambda data: preprocess(decode_image(data))), lambda images: images
    crop, *others, normalize = preprocess.transforms
    if not isinstance(crop, RandomResizedCrop) or len(others) != 2:  # those convert to RGB and to a float tensor
        raise TicError("OpenCLIP's --aug-cfg needs --image_backend pil")
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (normalize.mean, normalize.std))

    def load(data: bytes) -> torch.Tensor:
        image = decode_tensor(data)
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        part = image[None, :, top : top + height, left : left + width]
        return interpolate(part, crop.size, mode="bicubic", antialias=True)[0]

    def to_input(images: torch.Tensor) -> torch.Tensor:
        return images.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)

    return load, to_input


def decode(sample: RawSample, load: Callable, tokenizer: Callable) -> Item:
    """Return the image and tokens of a sample, augmented with its own seed; raise one of UNUSABLE if that fails."""
    if sample.image is None or sample.text is None:
        raise ValueError("no image" if sample.image is None else "no text")
    if not (text := sample.text.decode()).strip():
        raise ValueError("empty caption")
    torch.default_generator.manual_seed(sample.seed)  # torch.manual_seed asks every device, which costs 0.2 ms
    random.seed(sample.seed)
    np.random.seed(sample.seed & 0xFFFFFFFF)
    return load(sample.image), tokenizer(text)[0]


def read_usable(
    source: Source, positions: range, buffer_size: int, transforms: tuple, counts: Counts
) -> Iterator[Item]:
    """Yield the decoded samples at ``positions`` of a source's line; replace undecodable ones by those that follow.

    Raises a TicError if the first 1,000, or all of the source, are undecodable.
    """
    limit = 1000 if source.with_replacement else min(1000, source.sizes.sum())
    num_bad, is_usable = 0, False
    while True:
        for raw in read_line(source, positions, buffer_size):
            try:
                item = decode(raw, *transforms)
            except UNUSABLE as error:
                num_bad += 1
                counts[source.name]["undecodable"] += 1
                if num_bad == 1:
                    logging.warning("%s is left out: %s", raw.name, error)
                if not is_usable and num_bad >= limit:
                    message = f"none of {num_bad} samples can be used, {raw.name} for one: {error}"
                    raise TicError(f"{source.name}: {message}") from None
            else:
                is_usable = True
                counts[source.name]["read"] += 1
                yield item
        positions = range(positions.stop, positions.stop + len(positions))


def read_samples(sources: list[Source], ranges: list[range], transforms: tuple, counts: Counts) -> Iterator[Item]:
    """Yield the decoded samples at ``ranges`` of the sources' lines, merged in proportion."""
    lengths = list(map(len, ranges))
    buffer_sizes = [max(1, SHUFFLE_SIZE * length // max(1, sum(lengths))) for length in lengths]
    streams = [read_usable(*part, transforms, counts) for part in zip(sources, ranges, buffer_sizes, strict=True)]
    return (next(streams[i]) for i in sampling.interleave(lengths))


def make_batches(items: Iterator[Item], size: int) -> Iterator[list[torch.Tensor]]:
    """Yield batches of ``size`` images and tokens, in shared memory in a loader worker."""
    while batch := list(itertools.islice(items, size)):
        yield default_collate(batch)


class ExactDataset(IterableDataset):
    """The batches of one rank from block ``first`` to the end of the step, each with counts of what was read for it."""

    def __init__(self, plan: dict[str, Any], rank: int, world_size: int, transforms: tuple) -> None:
        self.plan, self.rank, self.world_size, self.transforms = plan, rank, world_size, transforms
        self.sources = read_sources(plan)  # before loader workers are forked, which share them
        self.first = 0

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], dict]]:
        """Yield this loader worker's ((images (B, 3, H, W) as loaded, tokens (B, L)), counts)."""
        plan, sources, info, counts = self.plan, self.sources, get_worker_info(), defaultdict(Counter)
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        blocks = range(plan["iterations"] // plan["block"])[self.first :]
        # The loader takes turns on from block to block, but what is in a batch depends on its place in the block.
        places = ((worker - i * plan["block"]) % num_workers for i in range(len(blocks)))
        parts = (
            sampling.source_ranges(plan, block, self.rank, self.world_size, place, num_workers)
            for block, place in zip(blocks, places, strict=False)
        )
        for ranges, following in itertools.pairwise(itertools.chain(parts, [[]])):
            for source, positions in zip([*sources, *sources], [*ranges, *following], strict=False):
                source.prefetch(positions)
            items = read_samples(sources, ranges, self.transforms, counts)
            for images, texts in make_batches(items, plan["batch_size"] // self.world_size):
                yield (images, texts), add_counts(counts)
                counts.clear()


class Loader:
    """The dataset behind ``workers`` processes, which prefetch across blocks; OpenCLIP's epoch is a block."""

    def __init__(self, dataset: ExactDataset, epoch: Any, workers: int, to_input: Callable) -> None:
        self.dataset, self.epoch = dataset, epoch
        self.to_input = to_input  # makes the model's input of the images that were loaded
        self.num_batches = dataset.plan["block"]
        self.num_samples = self.num_batches * dataset.plan["batch_size"]
        self.loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available())
        self.batches: Iterator[Any] = iter(())
        self.next_block: int | None = None  # that of self.batches
        self.counts: dict[str, dict[str, int]] = {}  # what all ranks have read in this process's blocks

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of the current block."""
        block, counts = self.epoch.get_value(), {}
        if block != self.next_block:
            self.dataset.first = block
            self.batches = iterate_batches(self.loader)
        # What the model draws must not depend on what was before the block: it may be the first of a process.
        torch.manual_seed(derive_seed(self.dataset.plan["seed"], "block", block, self.dataset.rank))
        for (images, texts), read in itertools.islice(self.batches, self.num_batches):
            counts = add_counts(counts, read)
            yield self.to_input(images), texts
        self.next_block = block + 1
        self.counts = add_counts(self.counts, *gathered(counts))


def gathered(value: Any) -> list[Any]:
    """Return the ``value`` of all ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
