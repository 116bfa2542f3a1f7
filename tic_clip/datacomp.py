"""What datacomp.patch calls: scales and exact sampling in train.py, the ``tic/`` tasks in evaluate.py, class ids in
resharder.py, and what keeps these files running on today's packages.

DataComp is https://github.com/mlfoundations/datacomp at commit 7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8; ``setup.sh
--datacomp`` makes the checkout. Its scripts run as programs, so an error of the user ends them in one line here.
"""

import argparse
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.scales import SCALES
from tic_clip.storage import to_path, write_json


def _shell(call: Callable) -> Callable:
    """End the program in one line on an error that the user can mend."""

    @functools.wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except TicError as error:
            sys.exit(f"error: {error}")

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


def adjusted(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A scale's configuration with what the flags override; OpenCLIP gets to know our architectures."""
    _add_architectures()
    given = {name: getattr(args, name) for name in ("train_num_samples", "warmup")}
    return config | {name: value for name, value in given.items() if value is not None}


def _add_architectures() -> None:
    import open_clip

    from tic_clip.macs import MODEL_CONFIGS

    open_clip.add_model_config(MODEL_CONFIGS)


@_shell
def sampling_flags(args: argparse.Namespace, config: dict[str, Any], rank: int) -> list[str]:
    """OpenCLIP's flags for how train.py samples, and where it starts from; they come after its own and win.

    Raises:
        SystemExit: the data lack a table of sizes, or are not enough for a batch.
    """
    flags = ["--new-run"] if args.new_run else []
    if args.dataset_resampled:
        return [*flags, "--dataset-resampled"]
    plan = exact_plan(args, config)
    path = to_path(args.output_dir) / f"{args.exp_name or f'{args.scale}_scale'}_plan.json"
    if rank == 0:
        write_json(path, plan)
    return [*flags, "--dataset-type", "exact", "--train-data", str(path)]


def exact_plan(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The plan of ``tic_clip.sampling`` for train.py's data: a source a folder, all samples alike, or by weight.

    Raises:
        TicError: a folder has no table of sizes, or a weight is missing or none.
    """
    from tic_clip.sampling import apportion
    from tic_clip.shards import split_sizes

    folders = [str(to_path(folder)) for folder in _urls(args.data_dir)]
    sizes = [sum(split_sizes(folder).values()) for folder in folders]
    weights = _weights(args.data_weights, len(folders)) if args.data_weights else sizes
    block = config["train_num_samples"] // args.num_checkpoints // config["batch_size"]
    if not block:
        raise TicError(f"{config['train_num_samples']} samples are less than a batch for each of the checkpoints")
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


class _Plain(pickle.Unpickler):
    """Reads what train.py pickles: built-in types and local paths, nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("PosixPath", "PurePosixPath") and module.partition(".")[0] == "pathlib":
            return {"PosixPath": PosixPath, "PurePosixPath": PurePosixPath}[name]
        raise TicError(f"it holds {module}.{name}, which is no path")


@_shell
def load_info(file: io.BufferedReader) -> dict[str, Any]:
    """The content of ``info.pkl``, without running any code of it.

    Raises:
        SystemExit: it holds anything but built-in types and local paths.
    """
    try:
        info = _Plain(file).load()
    except (TicError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise TicError(f"{file.name} is not what train.py writes: {error}") from None
    if not isinstance(info, dict) or not {"scale_config", "checkpoint"} <= info.keys():
        raise TicError(f"{file.name} is not what train.py writes")
    return info


@_shell
def evaluate_model(
    key: str, train_info: dict[str, Any], data_root: str | None, dataset_size: int | None, batch_size: int = 64
) -> dict[str, float]:
    """DataComp's ``eval_utils.main.evaluate_model``, with the ``tic/`` tasks through ``tic_clip.evaluation``.

    Raises:
        SystemExit: a ``tic/`` task that does not exist or has no data.
    """
    if not key.startswith("tic/"):
        from eval_utils.main import evaluate_model as datacomps

        _add_architectures()
        _mend_clip_benchmark()
        return datacomps(key, train_info, data_root, dataset_size, batch_size=batch_size)
    from tic_clip.evaluation import Settings, fingerprints, read_sets, score
    from tic_clip.tasks import task_of

    task, settings = task_of(key, data_root or "."), Settings(batch_size=batch_size)
    fingerprints([task])  # says so if there are no data
    encoder = _encoder(train_info["scale_config"]["model"], str(train_info["checkpoint"]), settings)
    ((_, _, numbers),) = score([encoder], [task], read_sets([task], settings))
    return numbers["metrics"]


@functools.cache
def _mend_clip_benchmark() -> None:
    """Let DataComp's own suite run on today's packages.

    clip_benchmark 1.6 makes a classifier of another type than the images' features unless it is told not to; NumPy 2.4
    refuses to make a float of an array of one element; webdataset refuses fewer shards than loader workers.
    """
    import webdataset
    from clip_benchmark.metrics import zeroshot_classification

    whole = functools.partial(zeroshot_classification.zero_shot_classifier, amp=False)
    zeroshot_classification.zero_shot_classifier = whole
    zeroshot_classification.float = lambda value: np.asarray(value).item()
    webdataset.WebDataset = functools.partial(webdataset.WebDataset, empty_check=False)


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
    parser.add_argument("-c", "--cls-file", type=Path, help=text)


@_shell
def open_classes(path: object) -> Callable[[np.ndarray], dict[str, bytes]]:
    """What gives a sample of a UID its class: ``{"cls": class id}``, or {} where none is listed.

    Raises:
        SystemExit: the file is missing, or is no table of classes.
    """
    if path is None:
        return lambda uid: {}
    from tic_clip.uids import CLASSES, find, open_uids

    table = open_uids(Path(str(path)), CLASSES)

    def look_up(uid: np.ndarray) -> dict[str, bytes]:
        first, found = find(table, np.atleast_1d(uid))
        return {"cls": b"%d" % table["class_id"][first[0]]} if found[0] else {}

    return look_up


def has_files(folder: Path) -> bool:
    """Whether there is anything in a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return any(folder.iterdir())


def remove_files(folder: Path) -> None:
    """Remove the files in a folder, before anything else is done."""
    for path in list(folder.iterdir()):
        if path.is_file():
            path.unlink()


class Pipe:
    """A shell command as a file: webdataset's class of this name, which has gone, as far as resharder.py needs it."""

    ignore_errors = False
    timeout = 7200.0  # seconds

    def __init__(
        self, command: str, mode: str, bufsize: int, ignore_status: list[int], stderr: int, shell: bool = True
    ) -> None:
        self.args, self.ignore_status, self.status = command, ignore_status, None
        end = "stdout" if mode[0] == "r" else "stdin"
        self.proc = subprocess.Popen(command, shell=shell, bufsize=bufsize, stderr=stderr, **{end: subprocess.PIPE})
        self.stream = getattr(self.proc, end)

    def read(self, *arguments: int) -> bytes:
        """Read from the command, and look at how it ended when it has."""
        data = self.stream.read(*arguments)
        if not data:
            self.wait_for_child()
        return data

    def readline(self, *arguments: int) -> bytes:
        """Read a line from the command."""
        return self.stream.readline(*arguments)

    def write(self, data: bytes) -> int:
        """Write to the command."""
        return self.stream.write(data)

    def close(self) -> None:
        """End the command's input or output, and wait for it."""
        self.stream.close()
        self.wait_for_child()

    def wait_for_child(self) -> None:
        """Wait for the command; resharder.py has its own."""
        self.status = self.proc.wait()

    def __enter__(self) -> "Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BoundingBoxBlurrer:
    """img2dataset's, which is made only where a picture is to be blurred: its packages do not fit today's."""

    def __call__(self, *arguments: Any) -> Any:
        """Blur as img2dataset does.

        Raises:
            SystemExit: it is not installed.
        """
        try:
            from img2dataset.blurrer import BoundingBoxBlurrer as Blurrer
        except ImportError as error:
            sys.exit(f"error: --apply-blur needs img2dataset ({error})")
        return Blurrer()(*arguments)
