"""Encode the images and distinct texts of a folder, or of a slice of it, with one or several models.

Loader processes decode the next batches while one is encoded. Models of one architecture, such as the steps of a run,
share the decoded images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data.decode import decode_image
from tic_clip.data.tar import UNUSABLE
from tic_clip.evaluation.claims import local_rank
from tic_clip.evaluation.data import Classes, EvalSet, read_images
from tic_clip.evaluation.features import Features, check_space
from tic_clip.models import Model, load_model
from tic_clip.parallel import iterate_batches, share

PRECISIONS = {"fp32": None, "amp": "float16", "amp_bf16": "bfloat16"}
"""OpenCLIP's names for them: weights in float32, and what autocast computes in."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate; only ``precision`` and (in the last bits) ``batch_size`` change the numbers."""

    batch_size: int = 256
    workers: int = 0
    precision: str = "fp32"
    device: str | None = None  # this process's GPU if there is one
    since: float = 0  # seconds of the epoch; results from before do not count
    models_at_once: int = 8  # in memory, of one architecture: a batch is decoded once for them
    skip_bad: bool = False  # count unusable samples in place of an error
    slice_size: int = 1 << 14  # images; of a larger folder, the processes of a launcher take slices


DEFAULTS = Settings()


def _load(batch: tuple, *, preprocess: Any, tokenizer: Any, skip_bad: bool) -> tuple[Any, list[int]]:
    """Return (images (B, 3, H, W) or tokens (B, L), the positions of samples that can't be decoded).

    ``batch``: "images" or "texts", and which of a folder's samples or captions.
    """
    import torch

    part, items = batch
    if part == "texts":
        return share(tokenizer(items)), []
    images, bad = [], []
    for i, (sample, data) in enumerate(zip(items, read_images(items), strict=True)):
        try:
            images.append(preprocess(decode_image(data)))
        except UNUSABLE as error:
            if not skip_bad:
                raise TicError(f"{sample.name}: bad image: {error} (--skip_bad leaves it out)") from None
            bad.append(i)
    return share(torch.stack(images) if images else torch.empty(0)), bad


class Encoder:
    """A loaded model that encodes images and texts."""

    def __init__(self, model: Model, settings: Settings) -> None:
        import torch

        self.model, self.settings, self.limit = model, settings, settings.batch_size
        gpus = torch.cuda.device_count()
        self.device = settings.device or (f"cuda:{local_rank() % gpus}" if gpus else "cpu")
        self.net, self.preprocess, self.tokenizer = load_model(model.arch, model.weights, self.device)
        self.device_type = torch.device(self.device).type
        self.call = {"images": self.net.encode_image, "texts": self.net.encode_text}
        self.classifier = cache(self._classifier)

    def encode(self, part: str, batch: Any) -> np.ndarray:
        """Return the normalised features (B, D) of a batch of images or texts; halve the batch if memory runs out."""
        import torch

        name = PRECISIONS[self.settings.precision]
        dtype = getattr(torch, name) if name else None
        try:
            with torch.inference_mode(), torch.autocast(self.device_type, dtype=dtype, enabled=bool(name)):
                pieces = [self.call[part](piece.to(self.device), normalize=True) for piece in batch.split(self.limit)]
                return torch.cat(pieces).float().cpu().numpy()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        self.limit = min(self.limit, len(batch)) // 2
        if not self.limit:
            raise TicError(f"{self.model.name}: the device is out of memory, even for one sample")
        return self.encode(part, batch)

    def _classifier(self, classes: Classes) -> np.ndarray:
        """Return the zero-shot classifier (C, D): the normalised mean over the templates of each class name."""
        tokens = _tokenize(self.tokenizer, classes)
        features = np.concatenate([self.encode("texts", batch) for batch in tokens.split(self.settings.batch_size)])
        means = features.reshape(len(classes.names), len(classes.templates), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)


@lru_cache(maxsize=1)
def _tokenize(tokenizer: Any, classes: Classes) -> Any:
    """Return the tokens (C · T, L) of each class name in each template, cached for all models of an architecture."""
    return tokenizer([template.replace("{c}", name) for name in classes.names for template in classes.templates])


def encode_set(encoders: Sequence[Encoder], name: str, found: EvalSet, part: slice = slice(None)) -> list[Features]:
    """Return the features of ``part`` of the samples by each encoder; all encode the same batches.

    The texts of a part are those that no earlier sample has. ``name``: the task's, for messages.
    """
    from torch.utils.data import DataLoader

    first, settings = encoders[0], encoders[0].settings
    contents = (("images", found.samples[part]), ("texts", found.texts(part)))
    index = [
        (kind, items[start : start + settings.batch_size])
        for kind, items in contents
        for start in range(0, len(items), settings.batch_size)
    ]
    load = partial(_load, preprocess=first.preprocess, tokenizer=first.tokenizer, skip_bad=settings.skip_bad)
    num_workers = min(settings.workers, len(index)) if len(index) > 2 else 0  # one batch each of images and texts: none
    loader = iterate_batches(DataLoader(index, batch_size=None, collate_fn=load, num_workers=num_workers))
    features, num_images = [Features() for _ in encoders], 0
    batches = progress(loader, f"evaluate: {name}", len(index), "batch")
    for (kind, items), (batch, bad) in zip(index, batches, strict=True):
        for encoder, each in zip(encoders, features, strict=True):
            each.bad += [num_images + i for i in bad]
            if len(batch):
                rows = encoder.encode(kind, batch)
                if not features[0].images.width:
                    check_space(name, len(encoders) * sum(len(items) for _, items in contents), rows.shape[1])
                getattr(each, kind).append(rows)
        num_images += len(items)
    return features
