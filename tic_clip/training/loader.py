"""The exact stream as a torch loader: what OpenCLIP's training loop iterates over, block by block."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from tic_clip.cli import progress
from tic_clip.parallel import iterate_batches
from tic_clip.training.sampling import seed_of, sources_of, stream, turns

Batch = tuple[torch.Tensor, torch.Tensor]


class ExactDataset(IterableDataset):
    """Batches of one rank from block ``first`` to the end of the step, each with the tally of what it took to make it.

    A batch is images (B, 3, H, W) and tokens (B, L).
    """

    def __init__(self, plan: dict[str, Any], rank: int, world_size: int, transforms: tuple) -> None:
        self.plan, self.rank, self.world_size, self.transforms = plan, rank, world_size, transforms
        self.first = 0

    def __iter__(self) -> Iterator[tuple[Batch, dict]]:
        """Yield the batches of this loader worker."""
        plan, info, tally = self.plan, get_worker_info(), Counter()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        blocks = range(self.first, plan["iterations"] // plan["block"])
        sources = sources_of(plan)
        for block, place in turns(blocks, plan["block"], worker, num_workers):
            items = stream(plan, sources, block, self.rank, self.world_size, place, num_workers, self.transforms, tally)
            while batch := list(itertools.islice(items, plan["batch_size"] // self.world_size)):
                images, texts = default_collate(batch)  # in a loader worker: right into memory that is shared
                yield (images, texts), dict(tally)
                tally.clear()


class Loader:
    """The dataset behind ``workers`` processes, which go on reading while a block ends and the next begins.

    ``num_batches`` and ``num_samples`` are those of a block, which is OpenCLIP's epoch; ``tally`` counts what all ranks
    have read in this process's blocks, {(source, "read" or the reason to leave out): samples}.
    """

    def __init__(
        self, plan: dict[str, Any], epoch: Any, rank: int, world_size: int, workers: int, transforms: tuple
    ) -> None:
        self.epoch, self.seed, self.rank = epoch, plan["seed"], rank
        self.num_batches = plan["block"]
        self.num_samples = self.num_batches * plan["batch_size"]
        self.dataset = ExactDataset(plan, rank, world_size, transforms)
        self.loader = DataLoader(
            self.dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
        self.following: int | None = None  # the block that the open iterator stands at
        self.batches: Iterator[Any] = iter(())
        self.tally: Counter = Counter()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current block."""
        block, tally = self.epoch.get_value(), Counter()
        if block != self.following:
            self.dataset.first = block
            self.batches = iterate_batches(self.loader)
        # What the model draws must not depend on what was before the block: it may be the first of a process.
        torch.manual_seed(seed_of(self.seed, "block", block, self.rank))
        for batch, read in itertools.islice(self.batches, self.num_batches):
            tally.update(read)
            yield batch
        self.following = block + 1
        for part in gathered(tally):
            self.tally.update(part)


def gathered(value: Any) -> list[Any]:
    """The ``value`` of each rank, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class WithProgress:
    """A training loader of OpenCLIP's or ours behind a progress bar for each checkpoint interval."""

    def __init__(self, info: Any, plan: dict[str, Any]) -> None:
        self.loader, self.epoch, self.plan, self.bar = info.dataloader, info.shared_epoch, plan, None
        self.num_batches, self.num_samples = self.loader.num_batches, self.loader.num_samples

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the current block."""
        blocks = self.plan["iterations"] // self.plan["block"] // self.plan["checkpoints"]
        number, block = divmod(self.epoch.get_value(), blocks)
        if self.bar is None:
            where = f"train {self.plan['step']}, {number + 1} of {self.plan['checkpoints']}"
            self.bar = progress(None, where, blocks * self.num_batches, "batch", done=block * self.num_batches)
        for batch in self.loader:
            yield batch
            self.bar.update()
        if block + 1 == blocks:
            self.bar.close()
            self.bar = None
