"""``eval_results.jsonl``, which evaluation appends to and the report reads, and the log of training.

One result is one JSON line: ``key`` (``tic/{dataset}/{task}/{cadence}/{period}``), ``dataset``, ``metrics`` (with
``main_metric``), ``num_samples``, ``benchmark``, ``method``, ``scale``, ``step``, ``samples_seen`` (of the whole run up
to that step), ``model`` and ``pins``. A later line replaces an earlier one of the same step, model and key.
"""

import json
import logging
import os
from pathlib import Path

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.runs import LOG
from tic_clip.storage import to_path

RESULTS = "eval_results.jsonl"
LOGGED = ("samples_seen", "loss", "lr", "samples_per_second")


def task_key(benchmark: Benchmark, task: str, period: str) -> str:
    """Return the key of the results of ``task`` on the data of ``period``."""
    return f"tic/{benchmark.dataset}/{task}/{benchmark.cadence}/{period}"


def append_result(path: Path, result: dict) -> None:
    """Append ``result`` to ``path`` as one line that is on disk when this returns.

    An incomplete line that a killed process left becomes a line of its own, which readers skip.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        is_incomplete = file.read() not in (b"", b"\n")
        file.write(b"\n" * is_incomplete + json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(path: object) -> list[dict]:
    """Return the results in ``path`` in the order of writing; other lines are skipped with a warning."""
    try:
        lines = to_path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise TicError(f"{path} is missing: run scripts/evaluate.py first") from None
    results, skipped = [], []
    for number, line in enumerate(lines, 1):
        result = _parse_object(line)
        if "key" in result and isinstance(result.get("metrics"), dict):
            results.append(result)
        elif line:
            skipped.append(str(number))
    if skipped:
        logging.warning("%s: skipped what is not a complete result: line %s", path, ", ".join(skipped))
    return results


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
    return [[one for one in log if set(LOGGED) <= set(one)] for log in logs]
