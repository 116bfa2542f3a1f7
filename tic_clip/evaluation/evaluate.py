"""Evaluate models on tasks: each model encodes the images and the different texts of a folder once.

Results are appended one by one; a task whose last result has the same weights, data, precision and metric version is
skipped.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tic_clip import TicError, metrics
from tic_clip.evaluation.claims import open_lock, process_rank, take
from tic_clip.evaluation.data import Classes, EvalSample, EvalSet, count_images, fingerprint, imagenet_classes, read_set
from tic_clip.evaluation.encode import DEFAULTS, Encoder, Settings, encode_set
from tic_clip.evaluation.features import Features, count_nonfinite, pick
from tic_clip.evaluation.results import RESULTS, append_result, own_results, read_results
from tic_clip.evaluation.tasks import Task
from tic_clip.models import Model
from tic_clip.runs import versions
from tic_clip.storage import is_dir, list_files, local_folder, read_json

FEATURES = "features"
"""The folder of the features of slices, until the folders of samples are scored."""
GROUPS = Path(__file__).parents[1] / "imagenet_groups.json"
"""Group -> ids of ImageNet's classes, by WordNet 3.0; frozen."""


class Unit(NamedTuple):
    """Work that one process takes: models of one architecture, which share what is decoded, and the tasks of a folder.

    The features of ``slices`` of its images are kept as files; with ``is_scored`` the tasks are scored by them, or
    without slices by features of the whole folder.
    """

    models: list[Model]
    tasks: list[Task]
    slices: list[slice]
    is_scored: bool = True


def evaluate(
    models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings = DEFAULTS
) -> list[dict[str, Any]]:
    """Score every model on every task and append the results; return the new ones.

    Any number of processes may do so at the same time: each takes the next folder that no other has, or a slice of a
    large one, and returns when all results are there.
    """
    work, results = _Work(models, tasks, output_dir, settings), []
    with open_lock(work.folder) as lock:
        path = own_results(work.folder, lock)
        for unit, missing in take(lock, work.units, work.list_missing):
            for result in work.do(unit, missing):
                results.append(result)
                append_result(path, result)
    return results


class _Work:
    """What is to be done, as one of the processes sees it, and the models that it has loaded."""

    def __init__(self, models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings) -> None:
        self.settings, self.output_dir, self.folder = settings, output_dir, local_folder(output_dir)
        self.data, self.started = fingerprints(tasks), time.time()
        self.encoders: dict[str, Encoder] = {}
        pending = [model for model, _ in list_pending(models, tasks, self.data, output_dir, settings)]
        self.units = list_units(pending, tasks, settings)

    def features_file(self, model: Model, unit: Unit, part: slice) -> Path:
        """Return the file of a model's features of a slice; its name says of what they are."""
        settings, data = self.settings, [self.data[task.key] for task in unit.tasks]
        content = repr((model.fingerprint, data, settings.precision, settings.skip_bad))
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.folder / FEATURES / f"{digest}-{part.start}-{part.stop}.npz"

    def list_missing(self, unit: Unit) -> list[tuple[str, str]]:
        """Return the parts of a unit that are not there: (model, file of features), then (model, key of a task)."""
        pending = list_pending(unit.models, unit.tasks, self.data, self.output_dir, self.settings, self.started)
        files = [(model.name, self.features_file(model, unit, part)) for part in unit.slices for model, _ in pending]
        keys = [(model.name, task.key) for model, some in pending for task in some if unit.is_scored]
        return [(name, str(file)) for name, file in files if not file.exists()] + keys

    def do(self, unit: Unit, missing: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """Keep the features that are among the missing parts, and yield the results that are."""
        names = {name for name, _ in missing}
        self.encoders = {model.name: self.encoders.get(model.name) for model in unit.models}  # others are freed
        for model in unit.models:
            if model.name in names and not self.encoders[model.name]:
                self.encoders[model.name] = Encoder(model, self.settings)
        chosen = [task for task in unit.tasks if any(key == task.key for _, key in missing)]
        found = read_samples(unit.tasks if unit.slices else chosen, self.settings)
        for part in unit.slices:
            files = {model.name: self.features_file(model, unit, part) for model in unit.models}
            needed = {name: file for name, file in files.items() if (name, str(file)) in missing}
            encoders = [self.encoders[name] for name in needed]
            features = encode_set(encoders, unit.tasks[0].name, found, part) if encoders else []
            for file, each in zip(needed.values(), features, strict=True):
                each.save(file)
        if not chosen:
            return
        scored = [model for model in unit.models if any((model.name, task.key) in missing for task in chosen)]
        files = {model.name: [self.features_file(model, unit, part) for part in unit.slices] for model in scored}
        encoders = [self.encoders[model.name] for model in scored]
        features = [read_features(files[model.name], unit.slices) for model in scored] if unit.slices else None
        for task, encoder, numbers in score(encoders, chosen, found, features):
            if (encoder.model.name, task.key) in missing:
                yield _describe(task, encoder, numbers) | {"data": self.data[task.key]}
        for file in chain(*files.values()):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # of other folders there are some
            (self.folder / FEATURES).rmdir()


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


def check_tasks(tasks: Sequence[Task], settings: Settings = DEFAULTS) -> None:
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


def list_units(models: Sequence[Model], tasks: Sequence[Task], settings: Settings) -> list[Unit]:
    """Return the units of work: slices of large folders, if a launcher has started several processes, then folders.

    The largest folders are first. Models that share what is decoded are of one architecture and local weights, as a tag
    can have its own transform; ``models_at_once`` of them are in a unit.
    """
    size = settings.slice_size
    folders = {task.folder: [each for each in tasks if each.folder == task.folder] for task in tasks if models}
    order = sorted(folders, key=lambda folder: -sum(count for _, count in list_files(folder, "**/*")))
    slices = {folder: [] for folder in order}
    for folder in order if process_rank()[1] > 1 else ():
        count = folders[folder][0].size or count_images(folder)
        slices[folder] = [slice(start, start + size) for start in range(0, count, size)] if count > size else []
    units = []
    for _, group in groupby(models, key=lambda model: (model.arch, Path(model.weights).is_file() or model.name)):
        some = list(group)
        for start in range(0, len(some), settings.models_at_once):
            at_once = some[start : start + settings.models_at_once]
            units += [Unit(at_once, folders[folder], slices[folder]) for folder in order]
    parts = [unit._replace(slices=[part], is_scored=False) for unit in units for part in unit.slices]
    return parts + units


def read_samples(tasks: Sequence[Task], settings: Settings) -> EvalSet:
    """Return the samples of a folder, with what all its ``tasks`` need; a TicError if not ``size`` of them."""
    folder = tasks[0].folder
    found = read_set(folder, {task.kind for task in tasks}, skip_bad=settings.skip_bad)
    count = len(found) + found.dropped.total()
    for task in tasks:
        if task.size not in (None, count):
            raise TicError(f"{folder} has {count} samples, the list of tasks says {task.size}")
    return found


def read_features(files: Sequence[Path], slices: Sequence[slice]) -> Features:
    """Return a model's features of a folder from the files of its slices."""
    features = Features()
    for file, part in zip(files, slices, strict=True):
        features.append(file, part.start)
    return features


def score(
    encoders: Sequence[Encoder], tasks: Sequence[Task], found: EvalSet, features: Sequence[Features] | None = None
) -> Iterator[tuple[Task, Encoder, dict[str, Any]]]:
    """Yield (task, encoder, its part of a result) of a folder's tasks, of each encoder's ``features`` if given."""
    features = features or encode_set(encoders, tasks[0].name, found)
    bad = set(features[0].bad)
    samples = [sample for i, sample in enumerate(found.samples) if i not in bad]
    if not samples:
        raise TicError(f"{tasks[0].folder} holds no image that can be decoded")
    for task in tasks:
        for encoder, each in zip(encoders, features, strict=True):
            yield task, encoder, _score(encoder, task, found, samples, each)


def _score(
    encoder: Encoder, task: Task, found: EvalSet, samples: list[EvalSample], features: Features
) -> dict[str, Any]:
    """Score a set by ``features``, whose images are ``samples`` in order."""
    images = features.images.read()
    if task.kind == "retrieval":
        index = {text: i for i, text in enumerate(found.texts())}
        which = np.array([index[caption] for sample in samples for caption in sample.captions])
        text_image = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
        keys = pick(features.texts.read(), which)
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
