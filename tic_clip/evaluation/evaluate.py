"""Models on tasks: a model is loaded once, the images and the different texts of a folder are encoded once by each.

Results are appended to ``eval_results.jsonl`` one by one. A task whose last line there is of the same weights, data,
precision and metric version is skipped. Loader processes decode the next batches, of the next task as well, while a
batch is encoded; models of one architecture, such as the steps of a run, share what is decoded.
"""

import io
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError, lookup, metrics
from tic_clip.cli import progress
from tic_clip.data.tar import UNUSABLE
from tic_clip.evaluation.data import Classes, EvalSet, fingerprint, imagenet_classes, read_set
from tic_clip.evaluation.results import RESULTS, append_result, read_results
from tic_clip.evaluation.tasks import Task, without_data
from tic_clip.models import Model, load_model
from tic_clip.runs import versions
from tic_clip.storage import NotFoundError, is_remote, read_json

PRECISIONS = {"fp32": None, "amp": "float16", "amp_bf16": "bfloat16"}
"""What OpenCLIP calls them: weights in float32, and what autocast computes in."""
GROUPS = Path(__file__).parents[1] / "imagenet_groups.json"
"""Group -> ids of ImageNet's classes, by WordNet 3.0; frozen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate; none of it but ``precision`` and, to the last bits, ``batch_size`` has a part in the numbers."""

    batch_size: int = 256
    workers: int = 0
    precision: str = "fp32"
    device: str | None = None  # the GPU where there is one
    force: bool = False  # also what is there already
    together: int = 8  # models of one architecture that are in memory at a time, for which a batch is decoded once
    skip_bad: bool = False  # count samples that can't be used in place of an error

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("together", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise TicError(f"--{name} is {getattr(self, name)}, it must be at least {least}")
        lookup(PRECISIONS, "precision", self.precision)


def evaluate(
    models: Sequence[Model], tasks: Sequence[Task], output_dir: str, settings: Settings = Settings()
) -> list[dict[str, Any]]:
    """Score every model on every task and append the results; returns those that are new.

    Raises:
        TicError: a task's data are missing or not as many as they should be, or a checkpoint does not fit.
    """
    data = fingerprints(tasks)
    todo = missing(models, tasks, data, output_dir, settings)
    sets = read_sets({task for _, _, some in todo for task in some}, settings)
    found = []
    for together in _together(todo, settings):
        sha = {model.name: fingerprint for model, fingerprint, _ in together}
        encoders = [Encoder(model, settings) for model, _, _ in together]
        for task, encoder, numbers in score(encoders, together[0][2], sets):
            model = encoder.model
            result = {
                "key": task.key,
                "dataset": task.name,
                **numbers,
                **model.about,
                "model": {"name": model.name, "arch": model.arch, "sha256": sha[model.name]},
                "data": data[task.key],
                **encoder.about(),
                "metric_version": metrics.METRIC_VERSION,
                "pins": versions(),
            }
            append_result(Path(output_dir) / RESULTS, result)
            found.append(result)
    return found


Todo = tuple[Model, str, list[Task]]
"""A model, its fingerprint, and the tasks on which it has no result."""


def _together(todo: list[Todo], settings: Settings) -> Iterator[list[Todo]]:
    """Yield the models that can share what is decoded: they have one architecture, files for weights, and one to-do."""
    for _, group in groupby(enumerate(todo), key=_shared):
        entries = [entry for _, entry in group]
        yield from (entries[i : i + settings.together] for i in range(0, len(entries), settings.together))


def _shared(item: tuple[int, Todo]) -> tuple:
    number, (model, _, tasks) = item
    alone = number if not Path(model.weights).is_file() else None  # a tag can have its own image transform
    return model.arch, alone, [task.key for task in tasks]


def fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """What each task's data are, by key.

    Raises:
        TicError: there are none.
    """
    found = {}
    for task in tasks:
        try:
            found[task.key] = fingerprint(task.folder, task.kind)
        except NotFoundError:
            raise TicError(f"no data for {task.key}: {without_data(task)}") from None
    return found


def missing(
    models: Sequence[Model], tasks: Sequence[Task], data: dict[str, str], output_dir: str, settings: Settings
) -> list[Todo]:
    """What there is to do, for each model that lacks a result.

    Args:
        data: as ``fingerprints`` gives it.

    Raises:
        TicError: ``output_dir`` is in a cloud, or two models have one name.
    """
    if is_remote(output_dir):
        raise TicError(f"{output_dir}: results are appended line by line, so they need a folder on a local disk")
    for what, names in (("models", [model.name for model in models]), ("tasks", [task.key for task in tasks])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise TicError(f"two {what} are called {twice[0]}")
    path = Path(output_dir) / RESULTS
    known = read_results(path) if path.exists() and not settings.force else []
    latest = {(line["model"]["name"], line["key"]): _state(line, line["model"]["sha256"]) for line in known}
    todo = []
    for model in models:
        sha = model.fingerprint()
        wanted = {"precision": settings.precision, "metric_version": metrics.METRIC_VERSION}
        some = [
            task
            for task in tasks
            if latest.get((model.name, task.key)) != _state({**wanted, "data": data[task.key]}, sha)
        ]
        todo += [(model, sha, some)] if some else []
    return todo


def _state(line: dict[str, Any], sha: str) -> tuple:
    """What a result depends on."""
    return sha, line["data"], line.get("precision"), line.get("metric_version")


def read_sets(tasks: Collection[Task], settings: Settings) -> dict[str, EvalSet]:
    """The samples of each task's folder, with what all its tasks need.

    Raises:
        TicError: as ``read_set``, or a folder has another number of samples than the list of tasks says.
    """
    kinds: dict[str, set[str]] = {}
    for task in tasks:
        kinds.setdefault(task.folder, set()).add(task.kind)
    sets = {folder: read_set(folder, kinds[folder], skip_bad=settings.skip_bad) for folder in sorted(kinds)}
    for task in tasks:
        there = len(sets[task.folder]) + sets[task.folder].dropped.total()
        if task.size not in (None, there):
            raise TicError(f"{task.folder} has {there} samples, the list of tasks says {task.size}")
    return sets


class Batches:
    """Batches of images and of texts of several sets, for a torch loader; ``places`` says what each is."""

    def __init__(self, sets: dict[str, EvalSet], preprocess: Any, tokenizer: Any, settings: Settings) -> None:
        self.sets, self.preprocess, self.tokenizer, self.skip_bad = sets, preprocess, tokenizer, settings.skip_bad
        self.places = [
            (folder, part, range(start, min(start + settings.batch_size, total)))
            for folder, found in sets.items()
            for part, total in (("images", len(found)), ("texts", len(found.texts)))
            for start in range(0, total, settings.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Any, list[int]]:
        """(images (B, 3, H, W) or tokens (B, L), the samples that are not in it as they can't be decoded)."""
        import torch

        folder, part, which = self.places[number]
        found = self.sets[folder]
        if part == "texts":
            return self.tokenizer(found.texts[which.start : which.stop]), []
        images, bad = [], []
        for i, data in zip(which, found.images(which.start, which.stop), strict=True):
            try:
                images.append(self.preprocess(decode(data)))
            except UNUSABLE as error:
                if not self.skip_bad:
                    raise TicError(f"{found.name(i)} has a bad image: {error} (--skip_bad leaves it out)") from None
                bad.append(i)
        return torch.stack(images) if images else torch.empty(0), bad


class Encoder:
    """A loaded model: turns images and texts into features."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings, self.limit = model, settings, settings.batch_size
        self.device = find_device(settings.device)
        self.net, self.preprocess, self.tokenizer = load_model(model.arch, model.weights, str(self.device))
        self.call = {"images": self.net.encode_image, "texts": self.net.encode_text}
        self.classifier = cache(self._classifier)

    def about(self) -> dict[str, Any]:
        """How it computes; the batch size is what the memory allowed."""
        return {"precision": self.settings.precision, "device": self.device.type, "batch_size": self.limit}

    def encode(self, part: str, batch: Any) -> np.ndarray:
        """The normalised features (B, D) of a batch of images or texts, in halves where the memory is too small."""
        import torch

        parts, start, kind = [], 0, PRECISIONS[self.settings.precision]
        dtype = getattr(torch, kind) if kind else None
        while start < len(batch):
            some = batch[start : start + self.limit].to(self.device)
            try:
                with torch.inference_mode(), torch.autocast(self.device.type, dtype=dtype, enabled=kind is not None):
                    parts.append(self.call[part](some, normalize=True).float().cpu().numpy())
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise TicError(f"{self.model.name}: the device is out of memory, even for one sample") from None
                self.limit = len(some) // 2
                continue
            start += len(some)
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    def _classifier(self, classes: Classes) -> np.ndarray:
        """The zero-shot classifier (C, D): the normalised mean over the templates of each class name."""
        tokens, size = _prompts(self.tokenizer, classes), self.settings.batch_size
        rows = [self.encode("texts", tokens[start : start + size]) for start in range(0, len(tokens), size)]
        means = np.concatenate(rows).reshape(len(classes.names), len(classes.templates), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)


@lru_cache(maxsize=1)
def _prompts(tokenizer: Any, classes: Classes) -> Any:
    """The tokens (C · T, L) of each class name in each template, which models of one architecture share.

    Raises:
        TicError: a template takes no name.
    """
    try:
        return tokenizer([template.format(c=name) for name in classes.names for template in classes.templates])
    except (LookupError, ValueError) as error:
        raise TicError(f"a prompt template is not one with {{c}} for the name: {error!r}") from None


def score(
    encoders: Sequence[Encoder], tasks: Sequence[Task], sets: dict[str, EvalSet]
) -> Iterator[tuple[Task, Encoder, dict[str, Any]]]:
    """Yield (task, encoder, its metrics and counts as they stand in a result); all encoders see the same batches."""
    wanted = {task.folder: sets[task.folder] for task in tasks}
    for folder, features, bad in _encode_all(encoders, wanted):
        found = wanted[folder].without(bad)
        for task in tasks:
            if task.folder == folder:
                for encoder, part in zip(encoders, features, strict=True):
                    yield task, encoder, _score(encoder, task, found, part)


Features = dict[str, list[np.ndarray]]
"""The features (B, D) of each batch of images, and of each of texts."""


def _encode_all(
    encoders: Sequence[Encoder], sets: dict[str, EvalSet]
) -> Iterator[tuple[str, list[Features], list[int]]]:
    """Yield (folder, its features by each encoder, the images that could not be decoded) of each set."""
    from torch.utils.data import DataLoader

    from tic_clip.parallel import iterate_batches

    first = encoders[0]
    data = Batches(sets, first.preprocess, first.tokenizer, first.settings)
    loader = iterate_batches(DataLoader(data, batch_size=None, num_workers=first.settings.workers))
    batches = zip(data.places, progress(loader, "evaluate", len(data), "batch"), strict=True)
    for folder, group in groupby(batches, key=lambda item: item[0][0]):
        features: list[Features] = [{"images": [], "texts": []} for _ in encoders]
        bad = []
        for (_, part, _), (batch, missed) in group:
            bad += missed
            for encoder, found in zip(encoders, features, strict=True):
                found[part].append(encoder.encode(part, batch))
        yield folder, features, bad


def _score(encoder: Encoder, task: Task, found: EvalSet, features: Features) -> dict[str, Any]:
    images = np.concatenate(features["images"])
    if len(found) != len(images):
        raise TicError(f"{task.key}: {len(images)} images were encoded, not {len(found)}")
    if not len(images):
        raise TicError(f"{task.folder} holds no image that can be decoded")
    if task.kind == "retrieval":
        keys = np.concatenate(features["texts"])[found.text_of]
        numbers, interval = metrics.retrieval(images, keys, found.text_image)
    else:
        keys = encoder.classifier(found.classes)
        numbers, interval = metrics.classification(images, keys, found.labels, _groups(found.classes))
    if task.main_metric not in numbers:
        raise TicError(f"{task.key} has no {task.main_metric}: there are {len(keys)} classes")
    main = task.main_metric == metrics.MAIN_METRIC[task.kind]
    return {
        "metrics": numbers | {"main_metric": numbers[task.main_metric]},
        "ci95": list(interval) if main else None,
        "num_samples": len(images),
        "coverage": found.coverage,
        "dropped": dict(found.dropped),
        "nonfinite": sum(int((~np.isfinite(part).all(axis=1)).sum()) for part in (images, keys)),
    }


def find_device(name: str | None) -> Any:
    """The torch device called ``name``, by default the GPU where there is one.

    Raises:
        TicError: it is not there.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises, by its build
        raise TicError(f"device {name} can't be used: {str(error).splitlines()[0]}") from None
    return device


def decode(data: bytes) -> Any:
    """The picture in the bytes of a file."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@cache
def _groups(classes: Classes) -> dict[str, list[int]] | None:
    """The groups of classes whose accuracy is told by itself, where the classes are ImageNet's."""
    return read_json(GROUPS) if classes.names == imagenet_classes().names else None
