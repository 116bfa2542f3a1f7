"""``eval_results.jsonl`` <-> step x period matrix.

One result is one JSON line: ``key`` (``tic/{dataset}/{task}/{cadence}/{period}``), ``dataset``, ``metrics`` (with
``main_metric``), ``num_samples``, ``benchmark``, ``method``, ``scale``, ``step``, ``samples_seen`` (of the whole run up
to that step), ``model`` and ``pins``. The file only grows: a line is written whole or not at all, and a later line
replaces an earlier one of the same step and key.
"""

import json
import math
import os

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.runs import LOG
from tic_clip.storage import is_remote, to_path

RESULTS = "eval_results.jsonl"
LOGGED = ("samples_seen", "loss", "lr", "samples_per_second")


def task_key(benchmark: Benchmark, task: str, period: str) -> str:
    """The key under which results of ``task`` on the data of ``period`` stand."""
    return f"tic/{benchmark.dataset}/{task}/{benchmark.cadence}/{period}"


def append_result(path: object, result: dict) -> None:
    """Append ``result`` to ``path`` as one line, in one write that is on disk when this returns.

    What an earlier, killed process left of a line is removed first.
    """
    if is_remote(path):
        raise TicError(f"{path}: results are appended line by line, so their file must be on a local disk")
    path = to_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _end_last_line(file)
        if os.write(file, line) != len(line):
            raise OSError(f"{path}: only part of a result could be written; is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def _end_last_line(file: int) -> None:
    """Make an open file end in a newline: cut off a torn last line, or end one that lacks its newline only."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return
    data = os.pread(file, size, 0)
    start = data.rfind(b"\n") + 1
    if _parse(data[start:]) is None:
        os.ftruncate(file, start)
    else:
        os.write(file, b"\n")


def read_results(path: object) -> list[dict]:
    """The results in ``path``, in the order in which they were written; a torn last line is left out.

    Raises:
        TicError: the file is missing, or a line that is not the torn last one holds no result.
    """
    try:
        data = to_path(path).read_bytes()
    except FileNotFoundError:
        raise TicError(f"{path} is missing") from None
    *lines, tail = data.split(b"\n")
    results = []
    for number, line in enumerate(lines, start=1):
        result = _parse(line)
        if result is None:
            raise TicError(f"{path}, line {number}: no evaluation result: {line[:60].decode(errors='replace')!r}")
        results.append(result)
    last = _parse(tail)
    return results if last is None else [*results, last]


def _parse(line: bytes) -> dict | None:
    """The result that ``line`` holds, or None where it holds none."""
    try:
        result = json.loads(line)
    except ValueError:  # no JSON, or bytes that are no text
        return None
    whole = isinstance(result, dict) and isinstance(result.get("key"), str) and isinstance(result.get("metrics"), dict)
    numbers = whole and all(isinstance(value, int | float | None) for value in result["metrics"].values())
    return result if numbers else None


def matrix(results: list[dict], benchmark: Benchmark, task: str, metric: str = "main_metric") -> np.ndarray:
    """``metric`` of each step's model on each period's data of ``task``.

    Returns:
        (num_steps, num_periods) float64; NaN where there is no result. The later of two results counts.

    Raises:
        TicError: a result is of a step or period that the benchmark lacks, or has no step, or lacks ``metric``.
    """
    values = np.full((len(benchmark.steps), len(benchmark.periods)), np.nan)
    columns = {task_key(benchmark, task, period): j for j, period in enumerate(benchmark.periods)}
    for result in results:
        key = result["key"]
        if not key.startswith(task_key(benchmark, task, "")):
            continue
        if key not in columns:
            raise TicError(f"{key} is of no period of {benchmark.name}: {', '.join(benchmark.periods)}")
        if metric not in result["metrics"]:
            raise TicError(f"{key} has no metric {metric!r}, only {', '.join(result['metrics'])}")
        values[benchmark.step_index(result.get("step")), columns[key]] = number(result, metric)
    return values


def number(result: dict, metric: str = "main_metric") -> float:
    """A result's ``metric``; NaN where it has none, or one that is no number or infinite."""
    value = result["metrics"].get(metric)
    return value if value is not None and math.isfinite(value) else math.nan


def reduce_periods(values: np.ndarray, benchmark: Benchmark) -> np.ndarray:
    """Average the periods of each step: (num_steps, num_periods) -> (num_steps, num_steps).

    With TiC-DataComp this is the 7 x 9 -> 7 x 7 reduction (2014, 2015 and 2016 belong to the first step). A mean over a
    missing cell is missing.
    """
    ends = np.cumsum([len(step.periods) for step in benchmark.steps])
    return np.stack([part.mean(axis=1) for part in np.split(values, ends[:-1], axis=1)], axis=1)


def read_log(run_dir: object, steps: list[str]) -> list[list[dict]]:
    """What training logged at each of ``steps``: the lines of ``{run_dir}/{step}/train.log.jsonl``, [] where none is.

    Half a line, as kill -9 leaves it, is passed over.
    """
    logs = []
    for step in steps:
        path = to_path(run_dir) / step / LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        logs.append([line for line in map(_parse_log, lines) if line])
    return logs


def _parse_log(line: str) -> dict | None:
    """The figures of a line of the log, or None where it has not all of them."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and all(isinstance(entry.get(name), int | float) for name in LOGGED)
    return entry if whole else None
