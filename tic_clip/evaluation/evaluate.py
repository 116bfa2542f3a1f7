"""Evaluate models on tasks: each model encodes the images and distinct texts of a folder once.

Results are appended one by one; a task whose last result has the same weights, data, precision and metric version is
skipped.
"""

import hashlib
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
from tic_clip.evaluation.data import Classes, EvalSet, count_images, fingerprint, imagenet_classes, read_set
from tic_clip.evaluation.encode import DEFAULTS, Encoder, Settings, encode_set
from tic_clip.evaluation.features import Features, count_nonfinite, pick, read_features
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
    """Work for one process: models of one architecture, which share decoded images, and the tasks of a folder."""

    models: list[Model]
    tasks: list[Task]
    slices: list[slice]  # whose features are kept as files; without any, the folder is encoded when it is scored
    is_scored: bool = True


def evaluate(
    models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings = DEFAULTS
) -> list[dict[str, Any]]:
    """Score every model on every task and append the results; return the new ones.

    Any number of processes may run this at the same time: each takes the next folder, or slice of a large one, that
    nobody has claimed, and returns when all results are there.
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
    """The work of an evaluation as one process sees it, and the models that it has loaded."""

    def __init__(self, models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings) -> None:
        self.settings, self.output_dir, self.folder = settings, output_dir, local_folder(output_dir)
        self.data = fingerprints(tasks)
        self.encoders: dict[str, Encoder] = {}
        pending = [model for model, _ in list_pending(models, tasks, self.data, output_dir, settings)]
        self.units = list_units(pending, tasks, settings)

    def files(self, model: Model, unit: Unit) -> list[Path]:
        """Return the files of a model's features of a unit's slices; names have a digest of what they depend on."""
        settings, data = self.settings, [self.data[task.key] for task in unit.tasks]
        content = repr((model.fingerprint, data, settings.precision, settings.skip_bad))
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return [self.folder / FEATURES / f"{digest}-{part.start}-{part.stop}.npz" for part in unit.slices]

    def list_missing(self, unit: Unit) -> list[tuple[str, str]]:
        """Return a unit's missing parts: (model, file of features), then (model, key of a task)."""
        pending = list_pending(unit.models, unit.tasks, self.data, self.output_dir, self.settings)
        by_model = [[(model.name, file) for file in self.files(model, unit)] for model, _ in pending]
        keys = [(model.name, task.key) for model, subset in pending for task in subset if unit.is_scored]
        return [(name, str(file)) for name, file in chain(*zip(*by_model, strict=True)) if not file.exists()] + keys

    def do(self, unit: Unit, missing: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """Write the missing features and yield the missing results."""
        names = {name for name, _ in missing}
        self.encoders = {model.name: self.encoders.get(model.name) for model in unit.models}  # others are freed
        for model in unit.models:
            if model.name in names and not self.encoders[model.name]:
                self.encoders[model.name] = Encoder(model, self.settings)
        chosen = [task for task in unit.tasks if any(key == task.key for _, key in missing)]
        found = read_samples(unit.tasks if unit.slices else chosen, self.settings)
        files = {model.name: self.files(model, unit) for model in unit.models}
        for i, part in enumerate(unit.slices):
            needed = {name: paths[i] for name, paths in files.items() if (name, str(paths[i])) in missing}
            if needed:
                features = encode_set([self.encoders[name] for name in needed], unit.tasks[0].name, found, part)
                for path, each in zip(needed.values(), features, strict=True):
                    each.save(path)
        if not chosen:
            return
        scored = [name for name in files if any((name, task.key) in missing for task in chosen)]
        encoders = [self.encoders[name] for name in scored]
        if unit.slices:
            features = [read_features(files[name], unit.slices) for name in scored]
        else:
            features = encode_set(encoders, chosen[0].name, found)
        for task in chosen:
            for encoder, each in zip(encoders, features, strict=True):
                if (encoder.model.name, task.key) in missing:
                    yield self.describe(task, encoder, score(encoder, task, found, each))
        for path in chain(*(files[name] for name in scored)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # of other folders there are some
            (self.folder / FEATURES).rmdir()

    def describe(self, task: Task, encoder: Encoder, numbers: dict[str, Any]) -> dict[str, Any]:
        """Return a result: ``numbers`` with model, task, settings and versions."""
        model = encoder.model
        return {
            "key": task.key,
            "dataset": task.name,
            **numbers,
            **model.about,
            "model": {"name": model.name, "arch": model.arch, "sha256": model.fingerprint},
            "precision": self.settings.precision,
            "device": encoder.device_type,
            "batch_size": encoder.limit,
            "metric_version": metrics.METRIC_VERSION,
            "pins": versions(),
            "time": time.time(),
            "data": self.data[task.key],
        }


def check_tasks(tasks: Sequence[Task], settings: Settings = DEFAULTS) -> None:
    """Raise a TicError if a task has no data, no classes, or no sample with an image and a caption or a class id."""
    fingerprints(tasks)
    for task in tasks:
        read_set(task.folder, {task.kind}, skip_bad=settings.skip_bad, first_only=True)


def fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Return key -> fingerprint of each task's data; raise a TicError if a task has no data."""
    for task in tasks:
        if not is_dir(task.folder):
            raise TicError(f"no data for {task.key}: {task.missing_message}")
    return {task.key: fingerprint(task.folder, task.kind) for task in tasks}


def list_pending(
    models: Sequence[Model], tasks: Sequence[Task], data: dict[str, str], output_dir: str, settings: Settings
) -> list[tuple[Model, list[Task]]]:
    """Return each model with missing results, and its tasks without one; ``data``: the tasks' fingerprints."""
    latest = {}
    for result in read_results(local_folder(output_dir) / RESULTS, quiet=True):
        if result.get("time", 0) >= settings.since:
            state = result["model"]["sha256"], result["data"], result.get("precision"), result.get("metric_version")
            latest[result["model"]["name"], result["key"]] = state

    def is_pending(model: Model, task: Task) -> bool:
        state = model.fingerprint, data[task.key], settings.precision, metrics.METRIC_VERSION
        return latest.get((model.name, task.key)) != state

    pending = [(model, [task for task in tasks if is_pending(model, task)]) for model in models]
    return [(model, subset) for model, subset in pending if subset]


def list_units(models: Sequence[Model], tasks: Sequence[Task], settings: Settings) -> list[Unit]:
    """Return the units of work: slices of large folders, if a launcher started several processes, then folders.

    The largest folders come first. A unit has up to ``models_at_once`` models with one architecture and local weights;
    a model with a tag is alone, since the tag can have its own transform.
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
    """Return the samples of a folder with what all its ``tasks`` need; raise a TicError if there are not ``size``."""
    folder = tasks[0].folder
    found = read_set(folder, {task.kind for task in tasks}, skip_bad=settings.skip_bad)
    count = len(found.samples) + found.dropped.total()
    for task in tasks:
        if task.size not in (None, count):
            raise TicError(f"{folder} has {count} samples, the list of tasks says {task.size}")
    return found


def score(encoder: Encoder, task: Task, found: EvalSet, features: Features) -> dict[str, Any]:
    """Return the numbers of a result, computed from features."""
    bad = set(features.bad)
    samples = [sample for i, sample in enumerate(found.samples) if i not in bad]
    if not samples:
        raise TicError(f"{task.folder} holds no image that can be decoded")
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
    is_main = task.main_metric in metrics.WITH_INTERVAL
    return {
        "metrics": numbers | {"main_metric": numbers[task.main_metric]},
        "ci95": list(interval) if is_main else None,
        "hits": hits if is_main else None,
        **(guess if is_main else dict.fromkeys(guess)),
        "num_samples": len(images),
        "coverage": found.coverage,
        "dropped": dict(found.dropped + Counter({"bad image": len(bad)})),
        "nonfinite": sum(count_nonfinite(rows) for rows in (images, keys)),
    }


@cache
def _groups(classes: Classes) -> dict[str, list[int]] | None:
    """Return the groups of classes for restricted accuracies if the classes are ImageNet's."""
    return read_json(GROUPS) if classes.names == imagenet_classes().names else None
