"""``eval_results.jsonl``, which evaluation appends to and the report reads, and the log of training.

One result is one JSON line: ``key`` (``tic/{dataset}/{task}/{cadence}/{period}``), ``dataset``, ``metrics`` (with
``main_metric``), ``num_samples``, ``benchmark``, ``method``, ``scale``, ``step``, ``samples_seen`` (of the whole run up
to that step), ``model`` and ``pins``. A later line replaces an earlier one of the same step, model and key.
"""

import json
import logging
import os

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.runs import LOG
from tic_clip.storage import is_remote, to_path

RESULTS = "eval_results.jsonl"
LOGGED = ("samples_seen", "loss", "lr", "samples_per_second")


def task_key(benchmark: Benchmark, task: str, period: str) -> str:
    """Return the key of the results of ``task`` on the data of ``period``."""
    return f"tic/{benchmark.dataset}/{task}/{benchmark.cadence}/{period}"


def append_result(path: object, result: dict) -> None:
    """Append ``result`` to ``path`` as one line, in one write that is on disk when this returns.

    An incomplete line that a killed process left becomes a line of its own, which readers skip.
    """
    if is_remote(path):
        raise TicError(f"{path}: results are appended line by line, so their file must be on a local disk")
    path = to_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        is_incomplete = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        line = b"\n" * is_incomplete + json.dumps(result).encode() + b"\n"
        if file.write(line) != len(line):
            raise OSError(f"{path}: only part of a result could be written; is the disk full?")
        os.fsync(file.fileno())


def read_results(path: object) -> list[dict]:
    """Return the results in ``path`` in the order of writing; other lines are skipped with a warning."""
    try:
        lines = to_path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise TicError(f"{path} is missing: run scripts/evaluate.py first") from None
    results = [_parse_object(line) for line in lines]
    is_result = [isinstance(one.get("key"), str) and _has_numbers(one.get("metrics")) for one in results]
    skipped = [str(i) for i, (line, good) in enumerate(zip(lines, is_result, strict=True), 1) if line and not good]
    if skipped:
        logging.warning("%s: skipped what is not a complete result: line %s", path, ", ".join(skipped))
    return [one for one, good in zip(results, is_result, strict=True) if good]


def _has_numbers(metrics: object) -> bool:
    return isinstance(metrics, dict) and all(isinstance(value, int | float | None) for value in metrics.values())


def _parse_object(line: bytes) -> dict:
    """Return the JSON object in ``line``; {} if it holds none."""
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not text
        return {}
    return value if isinstance(value, dict) else {}


def read_log(run_dir: object, steps: list[str]) -> list[list[dict]]:
    """Return the complete lines of ``{run_dir}/{step}/train.log.jsonl`` for each of ``steps``, [] without a log."""
    paths = [to_path(run_dir) / step / LOG for step in steps]
    logs = [map(_parse_object, path.read_bytes().split(b"\n")) if path.is_file() else [] for path in paths]
    return [[one for one in log if all(isinstance(one.get(name), int | float) for name in LOGGED)] for log in logs]
