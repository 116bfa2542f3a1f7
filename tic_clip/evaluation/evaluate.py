"""Evaluate models on tasks: each model encodes the images and the different texts of a folder once.

Results are appended one by one; a task whose last result has the same weights, data, precision and metric version is
skipped. Loader processes decode the next batches while one is encoded, models of one architecture, such as the steps of
a run, share what is decoded, and features are kept on disk.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError, metrics
from tic_clip.cli import progress
from tic_clip.data.decode import decode_image
from tic_clip.data.tar import UNUSABLE
from tic_clip.evaluation.claims import local_rank, open_lock, take
from tic_clip.evaluation.data import Classes, EvalSample, EvalSet, fingerprint, imagenet_classes, read_images, read_set
from tic_clip.evaluation.features import Rows, check_space, count_nonfinite, pick
from tic_clip.evaluation.results import RESULTS, append_result, own_results, read_results
from tic_clip.evaluation.tasks import Task
from tic_clip.models import Model, load_model
from tic_clip.parallel import iterate_batches, share
from tic_clip.runs import versions
from tic_clip.storage import is_dir, list_files, local_folder, read_json

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
    device: str | None = None  # this process's GPU if there is one
    force: bool = False  # also what has a result
    models_at_once: int = 8  # in memory, of one architecture: a batch is decoded once for them
    skip_bad: bool = False  # count unusable samples in place of an error


def evaluate(
    models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings = Settings()
) -> list[dict[str, Any]]:
    """Score every model on every task and append the results; return the new ones.

    Any number of processes may do so at the same time: each takes the next folder that no other has, and returns when
    all results are there.
    """
    data, started, folder = fingerprints(tasks), time.time(), local_folder(output_dir)
    results, encoders = [], {}

    def list_missing(unit: tuple[list[Model], list[Task]]) -> list[tuple[str, str]]:
        pending = list_pending(*unit, data, output_dir, settings, started)
        return [(model.name, task.key) for model, some in pending for task in some]

    pending = [model for model, _ in list_pending(models, tasks, data, output_dir, settings)]
    with open_lock(folder) as lock:
        path = own_results(folder, lock)
        for (group, some), missing in take(lock, list_units(pending, tasks, settings.models_at_once), list_missing):
            names, keys = (dict.fromkeys(part[i] for part in missing) for i in range(2))
            encoders = {model.name: encoders.get(model.name) for model in group}  # those of other groups are freed
            for model in group:
                if model.name in names and not encoders[model.name]:
                    encoders[model.name] = Encoder(model, settings)
            chosen, needed = [task for task in some if task.key in keys], [encoders[name] for name in names]
            for task, encoder, numbers in score(needed, chosen, read_samples(chosen, settings)):
                if (encoder.model.name, task.key) in missing:
                    results.append(_describe(task, encoder, numbers) | {"data": data[task.key]})
                    append_result(path, results[-1])
    return results


def _describe(task: Task, encoder: "Encoder", numbers: dict[str, Any]) -> dict[str, Any]:
    """Return a result: ``numbers``, what they are of, and how they were computed."""
    model = encoder.model
    return {
        "key": task.key,
        "dataset": task.name,
        **numbers,
        **model.about,
        "model": {"name": model.name, "arch": model.arch, "sha256": model.fingerprint},
        "precision": encoder.settings.precision,
        "device": encoder.device_type,
        "batch_size": encoder.limit,
        "metric_version": metrics.METRIC_VERSION,
        "pins": versions(),
        "time": time.time(),
    }


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
    models: Sequence[Model],
    tasks: Sequence[Task],
    data: dict[str, str],
    output_dir: str,
    settings: Settings,
    since: float = math.inf,
) -> list[tuple[Model, list[Task]]]:
    """Return each model that lacks a result, with the tasks it lacks; ``data`` are the tasks' fingerprints.

    With ``force``, results from before ``since`` do not count.
    """
    latest = {}
    for result in read_results(local_folder(output_dir) / RESULTS, quiet=True):
        if not settings.force or result.get("time", 0) >= since:
            state = result["model"]["sha256"], result["data"], result.get("precision"), result.get("metric_version")
            latest[result["model"]["name"], result["key"]] = state

    def is_pending(model: Model, task: Task) -> bool:
        state = model.fingerprint, data[task.key], settings.precision, metrics.METRIC_VERSION
        return latest.get((model.name, task.key)) != state

    pending = [(model, [task for task in tasks if is_pending(model, task)]) for model in models]
    return [(model, subset) for model, subset in pending if subset]


def list_units(models: Sequence[Model], tasks: Sequence[Task], size: int) -> list[tuple[list[Model], list[Task]]]:
    """Return the units of work, the largest first: the tasks of a folder, and up to ``size`` models for its images.

    These share what is decoded, so they are of one architecture and local weights; a tag can have its own transform.
    """
    folders = dict.fromkeys(task.folder for task in tasks) if models else ()
    order = sorted(folders, key=lambda folder: -sum(count for _, count in list_files(folder, "**/*")))
    units = []
    for _, group in groupby(models, key=lambda model: (model.arch, Path(model.weights).is_file() or model.name)):
        some = list(group)
        for start, folder in product(range(0, len(some), size), order):
            units.append((some[start : start + size], [task for task in tasks if task.folder == folder]))
    return units


def read_samples(tasks: Sequence[Task], settings: Settings) -> EvalSet:
    """Return the samples of a folder, with what all its ``tasks`` need; a TicError if not ``size`` of them."""
    folder = tasks[0].folder
    found = read_set(folder, {task.kind for task in tasks}, skip_bad=settings.skip_bad)
    count = len(found) + found.dropped.total()
    for task in tasks:
        if task.size not in (None, count):
            raise TicError(f"{folder} has {count} samples, the list of tasks says {task.size}")
    return found


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
    """A loaded model, which turns images and texts into features."""

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
    encoders: Sequence[Encoder], tasks: Sequence[Task], found: EvalSet
) -> Iterator[tuple[Task, Encoder, dict[str, Any]]]:
    """Yield (task, encoder, its part of a result) of a folder's tasks; all encoders see the same batches."""
    from torch.utils.data import DataLoader

    first, settings = encoders[0], encoders[0].settings
    index = [
        (part, items[start : start + settings.batch_size])
        for part, items in (("images", found.samples), ("texts", found.texts))
        for start in range(0, len(items), settings.batch_size)
    ]
    load = partial(_load, preprocess=first.preprocess, tokenizer=first.tokenizer, skip_bad=settings.skip_bad)
    num_workers = min(settings.workers, len(index))
    loader = iterate_batches(DataLoader(index, batch_size=None, collate_fn=load, num_workers=num_workers))
    samples, features = [], [{"images": Rows(), "texts": Rows()} for _ in encoders]
    batches = progress(loader, f"evaluate: {tasks[0].name}", len(index), "batch")
    for (part, items), (batch, bad) in zip(index, batches, strict=True):
        samples += [item for i, item in enumerate(items) if part == "images" and i not in bad]
        for encoder, parts in zip(encoders, features, strict=True) if len(batch) else ():
            rows = encoder.encode(part, batch)
            if not features[0]["images"].width:
                check_space(tasks[0].key, len(encoders) * (len(found) + len(found.texts)), rows.shape[1])
            parts[part].append(rows)
    if not samples:
        raise TicError(f"{tasks[0].folder} holds no image that can be decoded")
    for task in tasks:
        for encoder, parts in zip(encoders, features, strict=True):
            yield task, encoder, _score(encoder, task, found, samples, parts)


def _score(
    encoder: Encoder, task: Task, found: EvalSet, samples: list[EvalSample], features: dict[str, Rows]
) -> dict[str, Any]:
    """Score a set by ``features``: rows of "images", which ``samples`` are in order, and of "texts"."""
    images = features["images"].read()
    if task.kind == "retrieval":
        index = {text: i for i, text in enumerate(found.texts)}
        which = np.array([index[caption] for sample in samples for caption in sample.captions])
        text_image = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
        keys = pick(features["texts"].read(), which)
        numbers, interval, hits = metrics.retrieval(images, keys, text_image)
        guess = {"chance": 1 / len(images)}
    else:
        keys, labels = encoder.classifier(found.classes), np.array([sample.label for sample in samples])
        groups, metric = _groups(found.classes), task.main_metric
        numbers, interval, hits = metrics.classification(images, keys, labels, groups, metric)
        guess = {"chance": 1 / len(keys), "constant_guess": metrics.constant_guess(labels, metric)}
    if task.main_metric not in numbers:
        raise TicError(f"{task.key} has no {task.main_metric}: there are {len(keys)} classes")
    bad, is_main = Counter({"bad image": len(found) - len(samples)}), task.main_metric in metrics.WITH_INTERVAL
    return {
        "metrics": numbers | {"main_metric": numbers[task.main_metric]},
        "ci95": list(interval) if is_main else None,
        "hits": hits if is_main else None,
        **(guess if is_main else dict.fromkeys(guess)),
        "num_samples": len(images),
        "coverage": found.coverage,
        "dropped": dict(found.dropped + bad),
        "nonfinite": sum(count_nonfinite(rows) for rows in (images, keys)),
    }


@cache
def _groups(classes: Classes) -> dict[str, list[int]] | None:
    """Return the groups of classes with an accuracy of their own, if the classes are ImageNet's."""
    return read_json(GROUPS) if classes.names == imagenet_classes().names else None
