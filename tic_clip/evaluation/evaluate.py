"""Evaluate models on tasks: each model encodes the images and the different texts of a folder once.

Results are appended to ``eval_results.jsonl`` one by one; a task whose last line there has the same weights, data,
precision and metric version is skipped. Loader processes decode the next batches while one is encoded, and models of
one architecture, such as the steps of a run, share what is decoded.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError, metrics
from tic_clip.cli import progress
from tic_clip.data.decode import decode_image
from tic_clip.data.tar import UNUSABLE
from tic_clip.evaluation.data import Classes, EvalSample, EvalSet, fingerprint, imagenet_classes, read_images, read_set
from tic_clip.evaluation.results import RESULTS, append_result, read_results
from tic_clip.evaluation.tasks import Task
from tic_clip.models import Model, load_model
from tic_clip.parallel import iterate_batches, share
from tic_clip.runs import versions
from tic_clip.storage import is_dir, local_folder, read_json

PRECISIONS = {"fp32": None, "amp": "float16", "amp_bf16": "bfloat16"}
"""OpenCLIP's names for them: weights in float32, and what autocast computes in."""
GROUPS = Path(__file__).parents[1] / "imagenet_groups.json"
"""Group -> ids of ImageNet's classes, by WordNet 3.0; frozen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate; only ``precision`` and, to the last bits, ``batch_size`` change the numbers."""

    batch_size: int = 256
    workers: int = 0
    precision: str = "fp32"
    device: str | None = None  # the GPU if there is one
    force: bool = False  # also what has a result
    models_at_once: int = 8  # in memory, of one architecture: a batch is decoded once for them
    skip_bad: bool = False  # count unusable samples in place of an error


def evaluate(
    models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings = Settings()
) -> list[dict[str, Any]]:
    """Score every model on every task and append the results; return the new ones."""
    data = fingerprints(tasks)
    pending = list_pending(models, tasks, data, output_dir, settings)
    sets = read_sets({task for _, tasks in pending for task in tasks}, settings)
    results = []
    for group, some in _share_images(pending, settings.models_at_once):
        encoders = [Encoder(model, settings) for model in group]
        for task, encoder, numbers in score(encoders, some, sets):
            model = encoder.model
            result = {
                "key": task.key,
                "dataset": task.name,
                **numbers,
                **model.about,
                "model": {"name": model.name, "arch": model.arch, "sha256": model.fingerprint},
                "data": data[task.key],
                "precision": settings.precision,
                "device": encoder.device_type,
                "batch_size": encoder.limit,
                "metric_version": metrics.METRIC_VERSION,
                "pins": versions(),
            }
            append_result(Path(output_dir) / RESULTS, result)
            results.append(result)
    return results


def check_tasks(tasks: Sequence[Task], settings: Settings = Settings()) -> None:
    """Raise a TicError if a task has no data, no classes, or no sample with an image and a caption or a class id."""
    fingerprints(tasks)
    for task in tasks:
        read_set(task.folder, {task.kind}, skip_bad=settings.skip_bad, first_only=True)


def fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Return the fingerprint of each task's data by key; raise a TicError if there are none."""
    for task in tasks:
        if not is_dir(task.folder):
            raise TicError(f"no data for {task.key}: {task.missing_message}")
    return {task.key: fingerprint(task.folder, task.kind) for task in tasks}


def list_pending(
    models: Sequence[Model], tasks: Sequence[Task], data: dict[str, str], output_dir: str, settings: Settings
) -> list[tuple[Model, list[Task]]]:
    """Return each model that lacks a result, with the tasks it lacks; ``data`` are the tasks' fingerprints."""
    path, latest = local_folder(output_dir) / RESULTS, {}  # appended line by line, as no cloud can
    for result in read_results(path) if path.exists() and not settings.force else []:
        state = result["model"]["sha256"], result["data"], result.get("precision"), result.get("metric_version")
        latest[result["model"]["name"], result["key"]] = state

    def is_pending(model: Model, task: Task) -> bool:
        state = model.fingerprint, data[task.key], settings.precision, metrics.METRIC_VERSION
        return latest.get((model.name, task.key)) != state

    pending = [(model, [task for task in tasks if is_pending(model, task)]) for model in models]
    return [(model, subset) for model, subset in pending if subset]


def _share_images(pending: list[tuple[Model, list[Task]]], size: int) -> Iterator[tuple[list[Model], list[Task]]]:
    """Group up to ``size`` models that can share decoded images: same architecture, local weights, same tasks."""

    def shared(entry: tuple[Model, list[Task]]) -> tuple:
        own = "" if Path(entry[0].weights).is_file() else entry[0].name  # a tag can have its own image transform
        return entry[0].arch, own, entry[1]

    for (_, _, tasks), group in groupby(pending, key=shared):
        models = [model for model, _ in group]
        yield from ((models[i : i + size], tasks) for i in range(0, len(models), size))


def read_sets(tasks: Collection[Task], settings: Settings) -> dict[str, EvalSet]:
    """Return the samples of each task's folder, with what all its tasks need; a TicError if not ``size`` of them."""
    folders = sorted({task.folder for task in tasks})
    kinds = {folder: {task.kind for task in tasks if task.folder == folder} for folder in folders}
    sets = {folder: read_set(folder, kinds[folder], skip_bad=settings.skip_bad) for folder in folders}
    for task in tasks:
        count = len(sets[task.folder]) + sets[task.folder].dropped.total()
        if task.size not in (None, count):
            raise TicError(f"{task.folder} has {count} samples, the list of tasks says {task.size}")
    return sets


def _load(batch: tuple, *, preprocess: Any, tokenizer: Any, skip_bad: bool) -> tuple[Any, list[int]]:
    """Return (images (B, 3, H, W) or tokens (B, L), the positions of samples that can't be decoded).

    ``batch``: a folder, "images" or "texts", and which of its samples or captions.
    """
    import torch

    _, part, items = batch
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
    """A loaded model, which turns images and texts into features."""

    def __init__(self, model: Model, settings: Settings) -> None:
        import torch

        self.model, self.settings, self.limit = model, settings, settings.batch_size
        self.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.net, self.preprocess, self.tokenizer = load_model(model.arch, model.weights, self.device)
        self.device_type = torch.device(self.device).type
        self.call = {"images": self.net.encode_image, "texts": self.net.encode_text}
        self.classifier = cache(self._classifier)

    def encode(self, part: str, batch: Any) -> np.ndarray:
        """Return the normalised features (B, D) of a batch of images or texts, in halves if it is out of memory."""
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
    """Return the tokens (C · T, L) of each class name in each template, once for all models of an architecture."""
    return tokenizer([template.replace("{c}", name) for name in classes.names for template in classes.templates])


def score(
    encoders: Sequence[Encoder], tasks: Sequence[Task], sets: dict[str, EvalSet]
) -> Iterator[tuple[Task, Encoder, dict[str, Any]]]:
    """Yield (task, encoder, its part of a result); all encoders see the same batches."""
    from torch.utils.data import DataLoader

    first, settings = encoders[0], encoders[0].settings
    index = [
        (folder, part, items[start : start + settings.batch_size])
        for folder in dict.fromkeys(task.folder for task in tasks)
        for part, items in (("images", sets[folder].samples), ("texts", sets[folder].texts))
        for start in range(0, len(items), settings.batch_size)
    ]
    load = partial(_load, preprocess=first.preprocess, tokenizer=first.tokenizer, skip_bad=settings.skip_bad)
    loader = iterate_batches(DataLoader(index, batch_size=None, collate_fn=load, num_workers=settings.workers))
    batches = zip(index, progress(loader, "evaluate", len(index), "batch"), strict=True)
    for folder, group in groupby(batches, key=lambda item: item[0][0]):
        samples, features = [], [{"images": [], "texts": []} for _ in encoders]
        for (_, part, items), (batch, bad) in group:
            samples += [item for i, item in enumerate(items) if part == "images" and i not in bad]
            for encoder, parts in zip(encoders, features, strict=True) if len(batch) else ():
                parts[part].append(encoder.encode(part, batch))
        if not samples:
            raise TicError(f"{folder} holds no image that can be decoded")
        for task in (task for task in tasks if task.folder == folder):
            for encoder, parts in zip(encoders, features, strict=True):
                yield task, encoder, _score(encoder, task, sets[folder], samples, parts)


def _score(
    encoder: Encoder, task: Task, found: EvalSet, samples: list[EvalSample], features: dict[str, list]
) -> dict[str, Any]:
    """Score a set by ``features``, (B, D) of each batch of "images", which ``samples`` are in order, and of "texts"."""
    images = np.concatenate(features["images"])
    if task.kind == "retrieval":
        index = {text: i for i, text in enumerate(found.texts)}
        which = [index[caption] for sample in samples for caption in sample.captions]
        text_image = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
        keys = np.concatenate(features["texts"])[which]
        numbers, interval, hits = metrics.retrieval(images, keys, text_image)
    else:
        keys, labels = encoder.classifier(found.classes), np.array([sample.label for sample in samples])
        numbers, interval, hits = metrics.classification(images, keys, labels, _groups(found.classes))
    if task.main_metric not in numbers:
        raise TicError(f"{task.key} has no {task.main_metric}: there are {len(keys)} classes")
    is_main = task.main_metric == metrics.MAIN_METRIC[task.kind]
    bad = Counter({"bad image": len(found) - len(samples)})
    return {
        "metrics": numbers | {"main_metric": numbers[task.main_metric]},
        "ci95": list(interval) if is_main else None,
        "hits": hits if is_main else None,
        "chance": 1 / len(images if task.kind == "retrieval" else keys) if is_main else None,
        "num_samples": len(images),
        "coverage": found.coverage,
        "dropped": dict(found.dropped + bad),
        "nonfinite": sum(int((~np.isfinite(part).all(axis=1)).sum()) for part in (images, keys)),
    }


@cache
def _groups(classes: Classes) -> dict[str, list[int]] | None:
    """Return the groups of classes with an accuracy of their own, if the classes are ImageNet's."""
    return read_json(GROUPS) if classes.names == imagenet_classes().names else None
