"""What datacomp.patch calls, in DataComp's checkout, at commit 7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8: scales and
exact sampling in train.py, ``tic/`` tasks in evaluate.py, class ids in resharder.py, fixes for current packages.
"""

import argparse
import functools
import io
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from cloudpathlib import CloudPath

from tic_clip import TicError
from tic_clip.cli import format_os_error
from tic_clip.data.split import split_sizes
from tic_clip.data.uids import CLASS_ROW, find_uids, fingerprint, open_uids
from tic_clip.evaluation.encode import Encoder, Settings, encode_set
from tic_clip.evaluation.evaluate import fingerprints, read_samples, score
from tic_clip.evaluation.tasks import task_of
from tic_clip.models import HUB, MODEL_CONFIGS, Model, check_model
from tic_clip.storage import read_bytes, to_path, write_json
from tic_clip.training.config import SCALES
from tic_clip.training.sampling import apportion


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line on an error that the user can fix; a context manager or decorator."""
    try:
        yield
    except (TicError, OSError) as error:
        logging.disable()  # torch logs more at its end, since OpenCLIP has turned all loggers on
        sys.exit(f"error: {format_os_error(error) if isinstance(error, OSError) else error}")


def scales() -> dict[str, dict[str, Any]]:
    """Return tic_tiny … tic_xlarge in the form of DataComp's ``SCALE_CONFIGS``; samples are those of a step."""
    names = ("batch_size", "learning_rate", "warmup", "model", "beta2")
    return {
        key: {name: getattr(scale, name) for name in names} | {"train_num_samples": scale.samples_per_step}
        for key, scale in SCALES.items()
    }


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to train.py."""
    add = parser.add_argument
    add("--dataset_resampled", action="store_true", help="sample with replacement (default: all samples equally often)")
    add("--new_run", action="store_true", help="take only the weights of --resume: the next time step")
    add("--train_num_samples", type=int, help="samples to train on, instead of the scale's")
    add("--warmup", type=int, help="iterations of warm-up, instead of the scale's")


@exit_on_user_error()
def configure_training(config: dict[str, Any], args: argparse.Namespace, rank: int) -> tuple[dict[str, Any], list[str]]:
    """Return the scale's configuration changed by the flags, and OpenCLIP's flags; write the plan of exact sampling."""
    import open_clip

    open_clip.add_model_config(MODEL_CONFIGS)
    overrides = {name: getattr(args, name) for name in ("train_num_samples", "warmup")}
    config = config | {name: value for name, value in overrides.items() if value is not None}
    if args.resume == "latest" and args.new_run:
        raise TicError("--new_run takes the weights of a checkpoint: give one with --resume")
    flags = ["--new-run"] if args.new_run else []
    if args.dataset_resampled:
        return config, [*flags, "--dataset-resampled"]
    path = str(to_path(args.output_dir) / f"{args.exp_name or f'{args.scale}_scale'}_plan.json")
    plan = exact_plan(args, config)
    if rank == 0:
        write_json(path, plan)
    return config, [*flags, "--dataset-type", "exact", "--train-data", path]


def exact_plan(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Return an exact plan for train.py's data, with a source for each folder, by size or weight."""
    parts = str(args.data_dir).split("::")  # of a pathlib.Path, which has made one slash of a URL's two
    folders = [str(to_path(re.sub("^([a-z0-9]+):/(?!/)", r"\1://", part))) for part in parts]
    sizes = [sum(split_sizes(folder).values()) for folder in folders]
    weights = list(map(Fraction, args.data_weights.split("::"))) if args.data_weights else sizes
    batch_size, count = config["batch_size"], config["train_num_samples"]
    block = count // args.num_checkpoints // batch_size
    if block < 1:
        raise TicError(f"{count} samples are less than a batch of {batch_size} for each of the checkpoints")
    iterations = block * args.num_checkpoints
    names = folders if len(set(folders)) == len(folders) else [f"{i} {folder}" for i, folder in enumerate(folders)]
    samples = apportion(weights, iterations * batch_size)
    return {
        "step": args.exp_name or args.scale,
        "seed": args.seed,
        "batch_size": batch_size,
        "iterations": iterations,
        "block": block,
        "checkpoints": args.num_checkpoints,
        "sources": [
            {"name": name, "split": folder, "size": size, "used": size, "samples": count}
            for name, folder, size, count in zip(names, folders, sizes, samples, strict=True)
        ],
    }


class _InfoUnpickler(pickle.Unpickler):
    """An unpickler of containers, text, numbers and paths that refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        paths = ("PosixPath", "PurePosixPath", "S3Path", "GSPath", "AzureBlobPath")
        if module.partition(".")[0] in ("pathlib", "cloudpathlib") and name in paths:
            return super().find_class(module, name)
        raise TicError(f"it holds {module}.{name}, which is not a path")


@exit_on_user_error()
def load_info(path: Path) -> dict[str, Any]:
    """Return the content of ``info.pkl`` without running code from it; cloud paths become text."""
    data = read_bytes(path)
    try:
        info = _InfoUnpickler(io.BytesIO(data)).load()
        info = {name: str(value) if isinstance(value, CloudPath) else value for name, value in info.items()}
        info["scale_config"]["model"], info["checkpoint"]
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise TicError(f"{path} is not what train.py writes: {error}") from None
    return info


@exit_on_user_error()
def evaluate_model(
    key: str, train_info: dict[str, Any], data_root: str | None, dataset_size: int | None, batch_size: int = 64
) -> dict[str, float]:
    """Evaluate ``tic/`` tasks with tic_clip, and others with DataComp's ``eval_utils.main.evaluate_model``."""
    arch = train_info["scale_config"]["model"]
    weights = "" if arch.startswith(HUB) else str(train_info["checkpoint"])
    if not key.startswith("tic/"):
        from eval_utils.main import evaluate_model as evaluate

        check_model(arch, weights)
        _patch_packages()
        return evaluate(key, train_info, data_root, dataset_size, batch_size=batch_size)
    task, settings = task_of(key, data_root or "."), Settings(batch_size=batch_size)
    fingerprints([task])  # raises if the data are missing
    encoder, found = _encoder(arch, weights, settings), read_samples([task], settings)
    (features,) = encode_set([encoder], task.name, found)
    return score(encoder, task, found, features)["metrics"]


@functools.cache
def _patch_packages() -> None:
    """Patch packages so that DataComp's own suite runs with current ones and gives the numbers of the pinned ones."""
    import datasets
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    amp = torch.cuda.is_available()
    classifier = functools.partial(zeroshot_classification.zero_shot_classifier, amp=amp)
    zeroshot_classification.zero_shot_classifier = classifier
    zeroshot_classification.float = lambda value: np.asarray(value).item()
    zeroshot_retrieval.evaluate = functools.partial(zeroshot_retrieval.evaluate, amp=amp)
    open_clip.add_model_config(MODEL_CONFIGS)
    webdataset.WebDataset = _OldWebDataset
    datasets.load_dataset = functools.partial(_load_dataset, datasets.load_dataset)


class _OldWebDataset(webdataset.WebDataset):
    """A WebDataset with version 0.2.31's stages, as eval_utils takes the fifth for the decoder."""

    def __init__(self, urls: str, **options: Any) -> None:
        super().__init__(urls, **options)
        self.pipeline[3:] = [webdataset.tarfile_to_samples()]

    def compose(self, *stages: Any) -> Any:
        self.pipeline.extend(stages)
        return self


def _load_dataset(load_dataset: Callable, name: str, **options: Any) -> Any:
    """Load a dataset of the hub, or its Parquet copy if it is a script, which datasets no longer runs."""
    try:
        return load_dataset(name, **options)
    except RuntimeError:
        return load_dataset(name, revision="refs/convert/parquet", **options)


@functools.cache
def _encoder(arch: str, weights: str, settings: Settings) -> Encoder:
    """Load the model once for all tasks."""
    return Encoder(Model(name=f"{arch} {weights}", arch=arch, weights=weights), settings)


def add_class_flag(parser: argparse.ArgumentParser) -> None:
    """Add our flag to resharder.py."""
    text = ".npy of (UID, class id): samples listed there get a cls with their class id"
    parser.add_argument("-c", "--cls-file", type=_check_classes, help=text)


@exit_on_user_error()
def _check_classes(path: str) -> str:
    """Return the path of a table of classes after checking that it is one and sorted."""
    fingerprint(path, CLASS_ROW)
    return path


def open_classes(path: str | None) -> Callable[[np.ndarray], dict[str, bytes]]:
    """Return a function: UID -> members to add to its sample, ``{"cls": class id}`` or {}."""
    table = open_uids(path, CLASS_ROW) if path else np.empty(0, CLASS_ROW)

    def look_up(uid: np.ndarray) -> dict[str, bytes]:
        first, found = find_uids(table, np.atleast_1d(uid))
        return {"cls": b"%d" % table["class_id"][first[0]]} if found[0] else {}

    return look_up
