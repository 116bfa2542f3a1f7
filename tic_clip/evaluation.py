"""A model on a list of tasks: it is loaded once, every task's images and texts are encoded once.

Results are appended to ``eval_results.jsonl`` one by one; a task whose last line there is of the same weights and data
is skipped.
Task keys are ``tic/{dataset}/{task}/{cadence}/{period}``; the data of a task lie in
``{data_dir}/tic/{dataset}/{cadence}/eval/{task}/{period}/``.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError, metrics
from tic_clip.cli import progress
from tic_clip.macs import MODEL_CONFIGS
from tic_clip.plans import pins
from tic_clip.results import RESULTS, append_result, read_results, task_key
from tic_clip.shards import SIZES, known_sizes, list_tars
from tic_clip.storage import is_remote, to_path
from tic_clip.tarshard import IMAGES, Sample, open_shard, samples
from tic_clip.timeline import BENCHMARKS, Benchmark, get_benchmark
from tic_clip.training import read_done

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation set: its key, its name in the tables, its kind (retrieval or classification) and its folder."""

    key: str
    name: str
    kind: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to evaluate: an OpenCLIP architecture, a checkpoint file or pretrained tag, and what is known of it."""

    name: str
    arch: str
    weights: str
    about: dict[str, Any]  # copied into each result: benchmark, method, scale, step, samples_seen

    def fingerprint(self) -> str:
        """The SHA-256 of the checkpoint file, or the tag."""
        from tic_clip.weights import fingerprint

        return fingerprint(self.weights) if Path(self.weights).is_file() else f"{self.arch} {self.weights}"


def task_of(key: str, data_dir: str) -> Task:
    """The task with a key.

    Raises:
        TicError: no benchmark has it.
    """
    for benchmark in BENCHMARKS.values():
        for task, kind in benchmark.tasks.items():
            for period in benchmark.periods:
                if key == task_key(benchmark, task, period):
                    return _task(benchmark, task, kind, period, data_dir)
    raise TicError(f"unknown task {key!r}; keys are tic/{{dataset}}/{{task}}/{{cadence}}/{{period}}")


def tasks_of(benchmark: Benchmark, data_dir: str) -> list[Task]:
    """All tasks of a benchmark: each of its kinds on each of its periods."""
    return [
        _task(benchmark, task, kind, period, data_dir)
        for task, kind in benchmark.tasks.items()
        for period in benchmark.periods
    ]


def _task(benchmark: Benchmark, task: str, kind: str, period: str, data_dir: str) -> Task:
    title = benchmark.title.split(" ")[0]
    label = f"{title}Net" if kind == "classification" else f"{title}-Retrieval"
    return Task(
        key=task_key(benchmark, task, period),
        name=f"{label}-{benchmark.cadence.capitalize()}-{period}",
        kind=kind,
        folder=f"{data_dir.rstrip('/')}/{benchmark.root}/eval/{task}/{period}",
    )


def read_tasklist(path: str, data_dir: str) -> list[Task]:
    """The tasks of a YAML file whose keys are task keys, as DataComp's ``tasklist.yml`` has them.

    Raises:
        TicError: it is missing, is no such file, or names an unknown task.
    """
    import yaml

    try:
        keys = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise TicError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(keys, dict) or not keys:
        raise TicError(f"{path} is no list of tasks: its top level must have task keys")
    return [task_of(key, data_dir) for key in keys]


def models_of(run: str) -> list[Model]:
    """The last checkpoint of each finished step of a run of ours, in the order of its steps.

    Raises:
        TicError: no step of it is finished.
    """
    done = [read_done(path) for path in sorted(Path(run).glob("*/done.json"))]
    if not done:
        raise TicError(f"{run} has no finished step (no STEP/done.json): run scripts/train.py first")
    steps = get_benchmark(done[0]["plan"]["benchmark"]).step_index
    fields = ("benchmark", "method", "scale", "step", "samples_seen", "macs_seen")
    return [
        Model(
            name=f"{entry['plan']['method']} {entry['plan']['step']}",
            arch=entry["plan"]["model"],
            weights=str(Path(run) / entry["plan"]["step"] / entry["checkpoint"]),
            about={field: entry["plan"].get(field) for field in fields},
        )
        for entry in sorted(done, key=lambda entry: steps(entry["plan"]["step"]))
    ]


def evaluate(
    models: list[Model], tasks: list[Task], output_dir: str, *, batch_size: int = 256, workers: int = 0
) -> int:
    """Score every model on every task and append the results; returns how many were new.

    Raises:
        TicError: a task's data are missing or not as many as its table says, or a checkpoint does not fit.
    """
    if batch_size < 1 or workers < 0:
        raise TicError(f"batch size {batch_size} and {workers} workers: at least 1 and 0")
    if is_remote(output_dir):
        raise TicError(f"{output_dir}: results are appended line by line, so they need a folder on a local disk")
    path = Path(output_dir) / RESULTS
    known = read_results(path) if path.exists() else []
    latest = {(line["model"]["name"], line["key"]): (line["model"]["sha256"], line["data"]) for line in known}
    data = {task.key: data_fingerprint(task) for task in tasks}
    todo = [
        (model, sha, task)
        for model, sha in [(model, model.fingerprint()) for model in models]
        for task in tasks
        if latest.get((model.name, task.key)) != (sha, data[task.key])
    ]
    if not todo:
        return 0
    encoder = Encoder(todo[0][0], batch_size, workers)  # before the progress bar, as an unfit model is a likely mistake
    for model, sha, task in progress(todo, "evaluate", len(todo), "task"):
        if encoder.model != model:
            encoder = Encoder(model, batch_size, workers)
        numbers, num_samples = encoder.score(task)
        result = {
            "key": task.key,
            "dataset": task.name,
            "metrics": numbers | {"main_metric": numbers[metrics.MAIN_METRIC[task.kind]]},
            "num_samples": num_samples,
            **model.about,
            "model": {"name": model.name, "arch": model.arch, "sha256": sha},
            "data": data[task.key],
            "pins": pins(),
        }
        append_result(path, result)
    return len(todo)


def data_fingerprint(task: Task) -> str:
    """The SHA-256 of what a task is made of: its UIDs, its shards' sizes, its class names and templates.

    Where there is neither a table of sizes nor one of UIDs, each shard's name and bytes in all stand for them.

    Raises:
        TicError: the task has no data.
    """
    folder = to_path(task.folder)
    if not folder.is_dir():
        raise TicError(f"no data for {task.key}: {folder} is missing")
    digest = hashlib.sha256()
    tables = [file for file in (folder / SIZES, folder / "sample_ids.npy") if file.exists()]
    for file in tables:
        digest.update(file.read_bytes())
    for shard in [] if tables else map(to_path, list_tars(folder)):
        digest.update(f"{shard.name} {shard.stat().st_size}\n".encode())
    for name in (CLASSNAMES, TEMPLATES) if task.kind == "classification" else ():
        digest.update("\n".join(_read_lines(folder, name)).encode())
    return digest.hexdigest()


def _read_lines(folder: Path, name: str) -> list[str]:
    """The lines of a task's text file, in the split or (one for all periods) in the folder above it."""
    for place in (folder / name, folder.parent / name):
        if place.is_file():
            return place.read_text().strip().splitlines()
    raise TicError(f"{folder} has no {name}, and neither has the folder above it")


class EvalSet:
    """The samples of an evaluation split for a torch loader, in the order of its shards.

    Raises:
        TicError: it has no sample, not as many as its table says, or one without an image or a label.
    """

    def __init__(self, folder: str, preprocess: Any, tokenizer: Any, kind: str) -> None:
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.label = "txt" if kind == "retrieval" else "cls"
        sizes = known_sizes(folder)
        self.samples = [self._locate(path, sample) for path in sizes for sample in self._index(path, sizes[path])]
        if not self.samples:
            raise TicError(f"{folder} holds no sample")

    def _index(self, path: str, wanted: int | None) -> list[Sample]:
        with open_shard(path) as shard:
            found = list(samples(shard))
        if wanted is not None and len(found) != wanted:
            raise TicError(f"{path} holds {len(found)} samples, its {SIZES} says {wanted}")
        return found

    def _locate(self, path: str, sample: Sample) -> tuple[str, str, tuple[int, int], tuple[int, int]]:
        """(shard, key, place of the image, place of the label)."""
        image = next((suffix for suffix in IMAGES if suffix in sample.members), "image")
        for suffix in (image, self.label):
            if suffix not in sample.members:
                raise TicError(f"{path}: sample {sample.key} has no {suffix}")
        return path, sample.key, sample.members[image], sample.members[self.label]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        """(image (3, H, W), tokens (num_captions, L) or class id) of sample ``i``; each line is a caption."""
        from PIL import Image

        path, key, *places = self.samples[i]
        with open(to_path(path), "rb") as file:
            image, label = (os.pread(file.fileno(), size, at) for at, size in places)
        try:
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            target = self.tokenizer(label.decode().splitlines()) if self.label == "txt" else int(label)
        except (OSError, ValueError) as error:
            raise TicError(f"{path}: sample {key} has a bad image or {self.label}: {error}") from None
        return self.preprocess(picture), target


def _collate(batch: list[tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """(images (B, 3, H, W), tokens of all captions, captions of each image) of a batch of pairs."""
    import torch

    images, tokens = zip(*batch, strict=True)
    return torch.stack(images), torch.cat(tokens), torch.tensor([len(captions) for captions in tokens])


class Encoder:
    """A loaded model: turns tasks into features and features into numbers."""

    def __init__(self, model: Model, batch_size: int, workers: int) -> None:
        import torch

        self.model, self.batch_size, self.workers = model, batch_size, workers
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net, self.preprocess, self.tokenizer = load_model(model.arch, model.weights, self.device)
        self.classifiers = {}

    def score(self, task: Task) -> tuple[dict[str, float], int]:
        """(metrics, number of samples scored) of a task."""
        import torch

        data = EvalSet(task.folder, self.preprocess, self.tokenizer, task.kind)
        with torch.inference_mode():
            if task.kind == "retrieval":
                images, texts, counts = (np.concatenate(part) for part in zip(*self._pairs(data), strict=True))
                return metrics.retrieval(images, texts, np.repeat(np.arange(len(images)), counts)), len(images)
            classifier = self.classifier(to_path(task.folder))
            images, labels = (np.concatenate(part) for part in zip(*self._labelled(data), strict=True))
        if labels.min() < 0 or labels.max() >= len(classifier):
            ids = f"class ids are {labels.min()} to {labels.max()}"
            raise TicError(f"{task.key}: {ids}, there are {len(classifier)} class names")
        return metrics.classification(images, classifier, labels), len(images)

    def _batches(self, data: EvalSet) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        from tic_clip.loader import batches_of

        collate = _collate if data.label == "txt" else None
        yield from batches_of(
            DataLoader(data, batch_size=self.batch_size, num_workers=self.workers, collate_fn=collate)
        )

    def _pairs(self, data: EvalSet) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for images, tokens, counts in self._batches(data):
            yield self._images(images), self._texts(tokens), counts.numpy()

    def _labelled(self, data: EvalSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self._batches(data):
            yield self._images(images), labels.numpy()

    def _images(self, images: Any) -> np.ndarray:
        return self.net.encode_image(images.to(self.device), normalize=True).float().cpu().numpy()

    def _texts(self, tokens: Any) -> np.ndarray:
        return self.net.encode_text(tokens.to(self.device), normalize=True).float().cpu().numpy()

    def classifier(self, folder: Path) -> np.ndarray:
        """The zero-shot classifier (C, D) of a task: the normalised mean over the templates of each class name."""
        names = _read_lines(folder, CLASSNAMES)
        templates = _read_lines(folder, TEMPLATES)
        key = (tuple(names), tuple(templates))
        if key not in self.classifiers:
            rows = [self._texts(self.tokenizer([template.format(c=name) for template in templates])) for name in names]
            means = np.stack([row.mean(axis=0) for row in rows])
            self.classifiers[key] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return self.classifiers[key]


def load_model(arch: str, weights: str, device: str) -> tuple[Any, Any, Any]:
    """(model in evaluation mode, image transform, tokenizer) of an architecture with a checkpoint file or a tag.

    Raises:
        TicError: OpenCLIP knows neither, or the file does not fit the architecture.
    """
    from tic_clip.weights import load, mismatch

    if not Path(weights).is_file():
        return make_model(arch, device, tag=weights)
    model, *rest = make_model(arch, device)
    state = load(weights)
    difference = mismatch(state, model.state_dict())
    if difference:
        raise TicError(f"checkpoint {weights} is not of {arch}: {difference}")
    model.load_state_dict(state)
    return model, *rest


def make_model(arch: str, device: str, tag: str | None = None) -> tuple[Any, Any, Any]:
    """(model in evaluation mode, image transform, tokenizer) of an architecture, random or with a pretrained tag.

    Raises:
        TicError: OpenCLIP knows no such architecture or tag.
    """
    import open_clip

    open_clip.add_model_config(MODEL_CONFIGS)
    if arch not in open_clip.list_models():
        raise TicError(f"OpenCLIP has no model {arch!r}; `open_clip.list_models()` names those it has")
    if tag is not None and tag not in open_clip.list_pretrained_tags_by_model(arch):
        raise TicError(f"{tag} is neither a checkpoint file nor a pretrained tag of {arch}")
    model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=tag, device=device)
    return model.eval(), preprocess, open_clip.get_tokenizer(arch)
