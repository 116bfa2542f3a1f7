"""Read and write ``eval_results.jsonl``; read the training log.

One result is one JSON line: ``key`` (``tic/{dataset}/{task}/{cadence}/{period}``), ``dataset``, ``metrics`` (with
``main_metric``), ``num_samples``, ``benchmark``, ``method``, ``scale``, ``step``, ``samples_seen`` (of the whole run up
to that step), ``model``, ``pins`` and ``time`` (seconds since 1970). A later line replaces an earlier one of the same
step, model and key. Further processes write ``eval_results.1.jsonl``, … beside it.
"""

import hashlib
import io
import json
import logging
import os
import re
import zipfile
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.evaluation.claims import claim, process_rank
from tic_clip.runs import LOG
from tic_clip.storage import atomic_open, exists, is_dir, list_files, read_bytes, to_path

RESULTS, OTHERS = "eval_results.jsonl", "eval_results.{}.jsonl"
LOGGED = ("samples_seen", "loss", "lr", "samples_per_second")


def task_key(benchmark: Benchmark, task: str, period: str) -> str:
    """Return the key of ``task`` on ``period``."""
    return f"tic/{benchmark.dataset}/{task}/{benchmark.cadence}/{period}"


def own_results(folder: Path, lock: IO) -> Path:
    """Return the results file that is this process's own as long as ``lock`` is open."""
    rank, size = process_rank()
    number = next(number for number in count(rank, size) if claim(lock, OTHERS.format(number)))
    return folder / (OTHERS.format(number) if number else RESULTS)


def append_result(path: Path, result: dict) -> None:
    """Append ``result`` to ``path`` as one line, with fsync; write its ``hits`` (N,) to a file.

    An incomplete line left by a killed process becomes a separate line, which readers skip.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (hits := result.pop("hits", None)) is not None:
        with atomic_open(hits_path(path.parent, result["model"]["name"], result["key"])) as file:
            np.savez_compressed(file, hits=hits.astype(np.float16))
    with open(path, "ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        is_incomplete = file.read() not in (b"", b"\n")
        file.write(b"\n" * is_incomplete + json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def hits_path(folder: object, model: str, key: str) -> Any:
    """Return the file of a model's hits on a task; the main metric is their mean."""
    names = [re.sub(r"[^\w.-]+", "-", name)[-100:] for name in (model, key)]
    return to_path(folder) / "hits" / f"{names[0]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}" / f"{names[1]}.npz"


def read_hits(folder: object, model: str, key: str) -> np.ndarray | None:
    """Return the hits (N,) of a model on a task, or None if there is no file."""
    path = hits_path(folder, model, key)
    if not exists(path):
        return None
    try:
        return np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)["hits"].astype(float)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        raise TicError(f"{path} is damaged: delete it and run scripts/evaluate.py --force") from None


def read_results(path: object, *, quiet: bool = False) -> list[dict]:
    """Return the results in ``path`` and in the other processes' files beside it, in order of time.

    Raises a TicError if there is no file and warns of lines that are not results, unless ``quiet``.
    """
    folder = to_path(path).parent
    names = [name for name, _ in list_files(folder, "eval_results.*")] if is_dir(folder) else []
    found = [name for name in names if re.search(r"eval_results(\.\d+)?\.jsonl$", name)]
    if not found and not quiet:
        raise TicError(f"{path} is missing: run scripts/evaluate.py first")
    results = []
    for name in found:
        skipped = []
        for number, line in enumerate(read_bytes(name).split(b"\n"), 1):
            result = _parse_object(line)
            has_time = isinstance(result.get("time", 0), int | float)
            if "key" in result and isinstance(result.get("metrics"), dict) and has_time:
                results.append(result)
            elif line:
                skipped.append(str(number))
        if skipped and not quiet:
            logging.warning("%s: skipped what is not a complete result: line %s", name, ", ".join(skipped))
    return sorted(results, key=lambda result: result.get("time", 0))


def _parse_object(line: bytes) -> dict:
    """Return the JSON object in ``line``, or {}."""
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not text
        return {}
    return value if isinstance(value, dict) else {}


def read_log(run_dir: object, steps: list[str]) -> list[list[dict]]:
    """Return the complete lines of each step's train.log.jsonl; [] without a log."""
    paths = [to_path(run_dir) / step / LOG for step in steps]
    logs = [map(_parse_object, path.read_bytes().split(b"\n")) if path.is_file() else [] for path in paths]
    return [[one for one in log if set(LOGGED) <= set(one)] for log in logs]
