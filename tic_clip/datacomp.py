"""What datacomp.patch calls: scales and exact sampling in train.py, the ``tic/`` tasks in evaluate.py, class ids in
resharder.py, and what keeps these files running on today's packages.

DataComp is https://github.com/mlfoundations/datacomp at commit 7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8; ``setup.sh
--datacomp`` makes the checkout. Its scripts run as programs, so an error of the user ends them in one line here.
"""

import argparse
import functools
import io
import logging
import pickle
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import format_os_error
from tic_clip.scales import SCALES
from tic_clip.storage import NotFoundError, exists, is_remote, list_files, read_bytes, to_path, write_json


def shell(call: Callable) -> Callable:
    """End the program in one line on an error that the user can mend."""

    @functools.wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except (TicError, OSError) as error:
            logging.disable()  # torch has more to say at the end, now that OpenCLIP has turned on all loggers
            sys.exit(f"error: {format_os_error(error) if isinstance(error, OSError) else error}")

    return run


# scale_configs.py and train.py.


def scales() -> dict[str, dict[str, Any]]:
    """The scales tic_tiny … tic_xlarge in the form of DataComp's ``SCALE_CONFIGS``; samples are those of a step."""
    return {
        name: {
            "batch_size": scale.batch_size,
            "learning_rate": scale.learning_rate,
            "train_num_samples": scale.samples_per_step,
            "warmup": scale.warmup,
            "model": scale.model,
            "beta2": scale.beta2,
        }
        for name, scale in SCALES.items()
    }


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py has beside DataComp's."""
    replacement = "sample with replacement, as DataComp does; without it each sample is read as often as any other"
    parser.add_argument("--dataset_resampled", action="store_true", help=replacement)
    parser.add_argument("--new_run", action="store_true", help="take only the weights of --resume: the next time step")
    parser.add_argument("--train_num_samples", type=int, help="samples to train on, instead of the scale's")
    parser.add_argument("--warmup", type=int, help="iterations of warm-up, instead of the scale's")


@shell
def adjusted(config: dict[str, Any], args: argparse.Namespace, rank: int) -> tuple[dict[str, Any], list[str]]:
    """(a scale's configuration with what the flags override, OpenCLIP's flags for how to sample and to start).

    The flags come after train.py's own and win. Exact sampling's plan is written to ``{exp_name}_plan.json``, and
    OpenCLIP gets to know our architectures.

    Raises:
        SystemExit: data, their table of sizes or a checkpoint are missing, or flags ask for what can't be.
    """
    given = {name: getattr(args, name) for name in ("train_num_samples", "warmup")}
    config = config | {name: value for name, value in given.items() if value is not None}
    _check(config, args)
    _add_architectures()
    flags = ["--new-run"] if args.new_run else []
    if args.dataset_resampled:
        return config, [*flags, "--dataset-resampled"]
    plan = exact_plan(args, config)
    path = f"{_experiment(args)}_plan.json"
    if rank == 0:
        write_json(path, plan)
    return config, [*flags, "--dataset-type", "exact", "--train-data", path]


def _experiment(args: argparse.Namespace) -> str:
    """Where OpenCLIP writes."""
    return str(to_path(args.output_dir) / (args.exp_name or f"{args.scale}_scale"))


def _check(config: dict[str, Any], args: argparse.Namespace) -> None:
    """What train.py would stumble over.

    Raises:
        TicError: there is something.
    """
    samples, batch = config["train_num_samples"], config["batch_size"]
    for name in "num_checkpoints", "accum_freq":
        if getattr(args, name) < 1:
            raise TicError(f"--{name} is {getattr(args, name)}, it must be at least 1")
    if batch % args.accum_freq:
        raise TicError(f"--accum_freq {args.accum_freq} does not divide the batch of {batch}")
    workers = max(1, args.workers) if args.dataset_resampled else 1  # of which each reads whole batches
    if samples < batch * workers * args.num_checkpoints:
        each = "each of the checkpoints" + " and workers" * (workers > 1)
        raise TicError(f"{samples} samples are less than a batch of {batch} for {each}")
    if args.resume == "latest" and args.new_run:
        raise TicError("--new_run takes the weights of a checkpoint: give one with --resume")
    if args.resume != "latest" and not is_remote(args.resume) and not exists(args.resume):
        raise TicError(f"checkpoint {args.resume} is missing")
    if args.resume != "latest" and not args.new_run and exists(f"{_experiment(args)}/out.log"):
        raise TicError(f"{_experiment(args)} is there already: give another --exp_name, or go on without --resume")
    for folder in _urls(args.data_dir) if args.dataset_resampled else ():
        if not folder.endswith(".tar") and not list_files(folder, "**/*.tar"):
            raise TicError(f"{folder} holds no .tar file")


@shell
def train(main: Callable[[list[str]], int | None], flags: list[str], args: argparse.Namespace, rank: int) -> int | None:
    """OpenCLIP's ``main``.

    Raises:
        SystemExit: what it trains on or starts from can't be used, or it had nothing to do.
    """
    status = main(flags)
    if rank == 0 and not exists(f"{_experiment(args)}/checkpoints/epoch_latest.pt"):
        raise TicError(f"{args.resume} has no epoch left: with --new_run its weights start the next time step")
    return status


def _add_architectures() -> None:
    import open_clip

    from tic_clip.macs import MODEL_CONFIGS

    open_clip.add_model_config(MODEL_CONFIGS)


def exact_plan(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The plan of ``tic_clip.sampling`` for train.py's data: a source a folder, all samples alike, or by weight.

    Raises:
        TicError: a folder has no table of sizes, or a weight is missing or none.
    """
    from tic_clip.data.split import split_sizes
    from tic_clip.sampling import apportion

    folders = [str(to_path(folder)) for folder in _urls(args.data_dir)]
    sizes = [sum(split_sizes(folder).values()) for folder in folders]
    weights = _weights(args.data_weights, len(folders)) if args.data_weights else sizes
    block = config["train_num_samples"] // args.num_checkpoints // config["batch_size"]
    iterations = block * args.num_checkpoints
    samples = apportion(weights, iterations * config["batch_size"])
    names = folders if len(set(folders)) == len(folders) else [f"{i} {folder}" for i, folder in enumerate(folders)]
    sources = zip(names, folders, sizes, samples, strict=True)
    return {
        "step": args.exp_name or args.scale,
        "seed": args.seed,
        "batch_size": config["batch_size"] // args.accum_freq,
        "iterations": iterations * args.accum_freq,
        "block": block * args.accum_freq,
        "checkpoints": args.num_checkpoints,
        "sources": [
            {"name": name, "split": folder, "size": size, "used": size, "samples": count}
            for name, folder, size, count in sources
        ],
    }


def _urls(data_dir: object) -> list[str]:
    """The folders that ``--data_dir`` joins with ``::``; pathlib has made one slash of a URL's two."""
    parts = str(data_dir).split("::")
    return [part if "://" in part else part.replace(":/", "://", 1) for part in parts]


def _weights(text: str, count: int) -> list[Fraction]:
    try:
        weights = [Fraction(part) for part in text.split("::")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise TicError(f"--data_weights {text} must be {count} numbers above 0, joined with ::")
    return weights


# evaluate.py.


class _Url:
    """A cloud path as cloudpathlib pickles it, ``_str`` among its fields."""


PATHS = {("pathlib", "PosixPath"): PosixPath, ("pathlib", "PurePosixPath"): PurePosixPath}
PATHS |= {("cloudpathlib", name): _Url for name in ("S3Path", "GSPath", "AzureBlobPath")}


class _Plain(pickle.Unpickler):
    """Reads what train.py pickles: built-in types and paths, nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if found := PATHS.get((module.partition(".")[0], name)):
            return found
        raise TicError(f"it holds {module}.{name}, which is no path")


@shell
def load_info(path: Path) -> dict[str, Any]:
    """The content of ``info.pkl``, without running any code of it; cloud paths are text.

    Raises:
        SystemExit: it is missing, holds anything but built-in types and paths, or names no model.
    """
    try:
        info = _Plain(io.BytesIO(read_bytes(path))).load()
        info = {name: vars(value)["_str"] if isinstance(value, _Url) else value for name, value in info.items()}
        named = "model" in info["scale_config"] and "checkpoint" in info
    except NotFoundError:
        raise TicError(f"{path} is missing: train.py writes it at its end") from None
    except (TicError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise TicError(f"{path} is not what train.py writes: {error}") from None
    if not named:
        raise TicError(f"{path} is not what train.py writes: it names no model")
    return info


@shell
def evaluate_model(
    key: str, train_info: dict[str, Any], data_root: str | None, dataset_size: int | None, batch_size: int = 64
) -> dict[str, float]:
    """DataComp's ``eval_utils.main.evaluate_model``, with the ``tic/`` tasks through ``tic_clip.evaluation``.

    Raises:
        SystemExit: the model or the data of the task are not there, or a ``tic/`` task does not exist.
    """
    from tic_clip.models import HUB, check_model

    arch = train_info["scale_config"]["model"]
    weights = "" if arch.startswith(HUB) else str(train_info["checkpoint"])
    if not key.startswith("tic/"):
        from eval_utils.main import evaluate_model as datacomps

        check_model(arch, weights)
        _add_architectures()
        _mend_packages()
        return datacomps(key, train_info, data_root, dataset_size, batch_size=batch_size)
    from tic_clip.evaluation import Settings, fingerprints, read_sets, score
    from tic_clip.tasks import task_of

    task, settings = task_of(key, data_root or "."), Settings(batch_size=batch_size)
    fingerprints([task])  # says so if there are no data
    ((_, _, numbers),) = score([_encoder(arch, weights, settings)], [task], read_sets([task], settings))
    return numbers["metrics"]


@functools.cache
def _mend_packages() -> None:
    """Let DataComp's own suite run on today's packages, with the numbers that it had on those of its day.

    clip_benchmark has come to compute in bfloat16 where there is no GPU, on which classifiers and features differ in
    type; NumPy 2.4 refuses to make a float of an array of one element. Checkpoints are loaded as all of ours are.
    """
    import datasets
    import torch
    import webdataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from open_clip import factory

    from tic_clip.weights import load

    amp = torch.cuda.is_available()
    whole = functools.partial(zeroshot_classification.zero_shot_classifier, amp=amp)
    zeroshot_classification.zero_shot_classifier = whole
    zeroshot_classification.float = lambda value: np.asarray(value).item()
    zeroshot_retrieval.evaluate = functools.partial(zeroshot_retrieval.evaluate, amp=amp)
    factory.load_state_dict = lambda path, map_location="cpu": load(str(path))
    webdataset.WebDataset = _stages(webdataset)
    datasets.load_dataset = functools.partial(_load_dataset, datasets.load_dataset)


def _stages(webdataset: Any) -> type:
    """webdataset's ``WebDataset`` with the stages of 0.2.31, which eval_utils counts, and no check for empty workers.

    The fifth is the decoder, and stages are added in place, not to a copy.
    """

    class WebDataset(webdataset.WebDataset):
        def __init__(self, urls: str, **options: Any) -> None:
            super().__init__(urls, **options)
            self.pipeline[3:] = [webdataset.tarfile_to_samples()]

        def compose(self, *stages: Any) -> Any:
            self.pipeline.extend(stages)
            return self

    return WebDataset


def _load_dataset(load: Callable, name: str, **options: Any) -> Any:
    """``load_dataset`` of datasets, which no longer runs a dataset's script: the Parquet that the hub has made of it.

    Raises:
        TicError: it is neither in ``cache_dir`` nor on the hub.
    """
    try:
        try:
            return load(name, **options)
        except RuntimeError:
            return load(name, revision="refs/convert/parquet", **options)
    except (OSError, RuntimeError, ValueError) as error:
        cache, reason = options["cache_dir"] or "the cache", str(error).splitlines()[0]
        raise TicError(f"{name} is neither in {cache} nor on the hub: {reason}") from None


@functools.cache
def _encoder(arch: str, weights: str, settings: Any) -> Any:
    """The model, which is loaded once for all tasks."""
    from tic_clip.evaluation import Encoder
    from tic_clip.models import Model

    return Encoder(Model(name=f"{arch} {weights}", arch=arch, weights=weights), settings)


# resharder.py.


def add_class_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that resharder.py has beside DataComp's."""
    text = ".npy of (UID, class id): samples listed there get a cls with their class id"
    parser.add_argument("-c", "--cls-file", type=_classes, help=text)


@shell
def _classes(path: str) -> str:
    """The path of a table of classes, which is looked at before anything is done.

    Raises:
        SystemExit: it is missing, or is no sorted table of classes.
    """
    from tic_clip.data.uids import CLASS_ROW, fingerprint

    fingerprint(path, CLASS_ROW)
    return path


def open_classes(path: str | None) -> Callable[[np.ndarray], dict[str, bytes]]:
    """What gives a sample of a UID its class: ``{"cls": class id}``, or {} where none is listed."""
    if path is None:
        return lambda uid: {}
    from tic_clip.data.uids import CLASS_ROW, find_uids, open_uids

    table = open_uids(path, CLASS_ROW)

    def look_up(uid: np.ndarray) -> dict[str, bytes]:
        first, found = find_uids(table, np.atleast_1d(uid))
        return {"cls": b"%d" % table["class_id"][first[0]]} if found[0] else {}

    return look_up


@shell
def has_files(folder: Path, options: dict[str, Any]) -> bool:
    """Whether there is anything in the output folder that would have to go; it is made if it is missing.

    ``options`` are resharder.py's, of which a wrong one is told before anything goes.

    Raises:
        SystemExit: the folder is the pool's or no folder, the subset is missing, or blurring lacks its package.
    """
    if Path(str(folder)).resolve() == Path(str(options["input_dir"])).resolve():
        raise TicError(f"{folder} is the pool itself")
    if not exists(options["subset_file"]):
        raise TicError(f"{options['subset_file']} is missing")
    if options["apply_blur"]:
        _img2dataset()
    if options["dry_run"]:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return any(folder.iterdir())


def remove_files(folder: Path) -> None:
    """Remove the files in a folder, before anything else is done."""
    for path in list(folder.iterdir()):
        if path.is_file():
            path.unlink()


def restored(gopen: Callable) -> Any:
    """webdataset's ``gopen`` with ``Pipe`` and ``info``: its name stood for the module, and stands for the function."""
    module = sys.modules[gopen.__module__]
    gopen.Pipe, gopen.info = module.Pipe, module.info
    return gopen


class BoundingBoxBlurrer:
    """img2dataset's, which is made only where a picture is to be blurred: its packages do not fit today's."""

    def __call__(self, *arguments: Any) -> Any:
        """Blur as img2dataset does."""
        return _img2dataset().BoundingBoxBlurrer()(*arguments)


def _img2dataset() -> Any:
    try:
        from img2dataset import blurrer
    except ImportError as error:
        raise TicError(f"--apply-blur needs img2dataset ({error})") from None
    return blurrer
