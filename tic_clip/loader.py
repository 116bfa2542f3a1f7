"""The exact stream as a torch loader: what OpenCLIP's training loop iterates over."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.sampling import stream


class ExactDataset(IterableDataset):
    """Batches of one rank: images (B, 3, H, W) and tokens (B, L); ``epoch`` is OpenCLIP's shared counter."""

    def __init__(self, plan: dict[str, Any], epoch: Any, rank: int, world_size: int, transforms: tuple) -> None:
        self.plan, self.epoch, self.rank, self.world_size, self.transforms = plan, epoch, rank, world_size, transforms

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of this loader worker."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        items = stream(
            self.plan, self.epoch.get_value(), self.rank, self.world_size, worker, num_workers, self.transforms
        )
        while batch := list(itertools.islice(items, self.plan["batch_size"] // self.world_size)):
            images, texts = zip(*batch, strict=True)
            yield torch.stack(images), torch.stack(texts)


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The batches of ``loader``; a user's error in one of its processes comes without that process's traceback.

    Raises:
        TicError: one was raised in the dataset.
    """
    try:
        yield from loader
    except TicError as error:  # a worker's comes with its traceback, the message last
        message = str(error).strip().splitlines()[-1]
        raise TicError(message.removeprefix(f"{TicError.__module__}.TicError: ")) from None


class Loader:
    """The dataset behind ``workers`` processes; ``num_batches`` is that of a checkpoint interval, of one rank."""

    def __init__(
        self, plan: dict[str, Any], epoch: Any, rank: int, world_size: int, workers: int, transforms: tuple
    ) -> None:
        self.num_batches = plan["iterations"] // plan["checkpoints"]
        self.num_samples = self.num_batches * plan["batch_size"]
        self.batches = DataLoader(
            ExactDataset(plan, epoch, rank, world_size, transforms),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of the current checkpoint interval."""
        yield from batches_of(self.batches)


class WithProgress:
    """A training loader of OpenCLIP's or ours behind a progress bar for each checkpoint interval."""

    def __init__(self, info: Any, step: str, checkpoints: int) -> None:
        self.loader, self.epoch, self.step, self.checkpoints = info.dataloader, info.shared_epoch, step, checkpoints
        self.num_batches, self.num_samples = self.loader.num_batches, self.loader.num_samples

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the current checkpoint interval."""
        where = f"train {self.step}, {self.epoch.get_value() + 1} of {self.checkpoints}"
        yield from progress(self.loader, where, self.num_batches, "batch")


def get_data_with_progress(args: Any, *more: Any, **options: Any) -> dict[str, Any]:
    """OpenCLIP's ``get_data`` with a progress bar for training; a run's name is its step's."""
    from training.data import get_data

    data = get_data(args, *more, **options)
    data["train"].dataloader = WithProgress(data["train"], args.name, args.epochs)
    return data
