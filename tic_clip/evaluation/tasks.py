"""Evaluation tasks: those of the benchmarks, and static ones from a task list.

Keys are ``tic/{dataset}/{task}/{cadence}/{period}``, with data in
``{data_dir}/tic/{dataset}/{cadence}/eval/{task}/{period}/``. Any other key is a static task, with data in
``{data_dir}/wds_{key}_test/``, as in DataComp's ``tasklist.yml``, or in its entry's ``folder``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup
from tic_clip.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from tic_clip.evaluation.results import task_key
from tic_clip.metrics import KS, MAIN_METRIC
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import exists, is_remote

METRICS = {
    "retrieval": ("mean_recall@1", *(f"{which}_retrieval_recall@{k}" for which in ("image", "text") for k in KS)),
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
}
"""Kinds of tasks, and what can be the main metric of each."""

FIELDS = ("folder", "kind", "main_metric", "name", "num_classes", "random_score", "size", "tags", "time")
"""What an entry of a task list may have; the last five are DataComp's, of which ``size`` is checked here."""

DATACOMP_GROUPS = tuple(
    f"tic/datacomp/{task}/{cadence}" for cadence in ("yearly", "monthly") for task in ("retrieval", "datacompnet")
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation set."""

    key: str
    name: str  # in the tables
    kind: str  # one of METRICS
    folder: str
    main_metric: str
    size: int | None = None  # how many samples it must have, if a task list says so
    missing_message: str = ""  # the error if the folder does not exist
    benchmark: str = ""  # none for a static task

    @property
    def group(self) -> str:
        """Return the key without the period."""
        return self.key.rpartition("/")[0]


def tasks_of(benchmark: Benchmark, data_dir: str) -> list[Task]:
    """Return all tasks of a benchmark, on all periods."""
    title, tasks = benchmark.title.split(" ")[0], []
    for task, kind in benchmark.tasks.items():
        label = f"{title}Net" if kind == "classification" else f"{title}-Retrieval"
        for period in benchmark.periods:
            folder = f"{data_dir.rstrip('/')}/{benchmark.root}/eval/{task}/{period}"
            missing = benchmark.missing_data_message(folder, data_dir.rstrip("/") or "/")
            key, name = task_key(benchmark, task, period), f"{label}-{benchmark.cadence.capitalize()}-{period}"
            fields = {"key": key, "name": name, "kind": kind, "folder": folder, "benchmark": benchmark.name}
            tasks.append(Task(**fields, main_metric=benchmark.main_metric(task), missing_message=missing))
    return tasks


def groups_of(benchmark: Benchmark) -> list[str]:
    """Return the groups of a benchmark's tasks, such as ``tic/datacomp/retrieval/yearly``."""
    return [task_key(benchmark, task, "").rstrip("/") for task in benchmark.tasks]


def find_tasks(name: object, data_dir: str) -> list[Task]:
    """Return the task with a key, or the tasks of a group such as ``tic/datacomp/retrieval/yearly``.

    A user's own benchmark is read from the benchmark.yaml beside its data.
    """
    found = re.fullmatch(r"tic/([\w.-]+)/[\w.-]+/([\w.-]+)(/[\w.-]+)?", str(name))
    if found and found[1] not in {benchmark.dataset for benchmark in BENCHMARKS.values()}:
        path = f"{data_dir or '.'}/tic/{found[1]}/{found[2]}/{BENCHMARK_FILE}"
        if exists(path):
            get_benchmark(path)
    tasks = [task for benchmark in BENCHMARKS.values() for task in tasks_of(benchmark, data_dir)]
    matches = [task for task in tasks if name in (task.key, task.group)]
    if not matches:
        known = ", ".join(dict.fromkeys(task.group for task in tasks))
        raise TicError(f"unknown evaluation task {name!r}; the groups are {known}, a key adds /PERIOD to one")
    return matches


def task_of(key: str, data_dir: str) -> Task:
    """Return the benchmark's task with a key; raise a TicError if there is none."""
    first, *others = find_tasks(key, data_dir)
    if others:
        raise TicError(f"{key} is a group of tasks: add a period, as in {first.key}")
    return first


def read_tasklist(path: str, data_dir: str) -> list[Task]:
    """Return the tasks of a YAML file of task key -> fields; a key may also name all periods of a task."""
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TicError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, dict):
        raise TicError(f"{path} is not a list of tasks: its top level must have task keys")
    tasks = []
    try:
        for key, entry in entries.items():
            is_static = isinstance(key, str) and not key.startswith("tic/")
            tasks += [static_task(key, entry or {}, data_dir)] if is_static else find_tasks(key, data_dir)
    except TicError as error:
        raise TicError(f"{path}: {error}") from None
    return tasks


def static_task(key: str, entry: dict[str, Any], data_dir: str) -> Task:
    """Return a static task: a clip_benchmark webdataset, or a folder of images for each class."""
    if not isinstance(entry, dict) or set(entry) - set(FIELDS):
        raise TicError(f"task {key} has {entry!r}; a task may have {', '.join(FIELDS)}")
    kind = entry.get("kind", "retrieval" if key.startswith("retrieval/") else "classification")
    known, metric = lookup(METRICS, "kind of task", kind, "kinds"), entry.get("main_metric", MAIN_METRIC.get(kind))
    if metric not in known or key.startswith(("wilds/", "fairness/", "misc/")):
        raise TicError(f"task {key} needs DataComp's own evaluate.py; a {kind} task here has {', '.join(known)}")
    folder = str(entry.get("folder", f"wds_{key.replace('/', '-')}_test"))
    if not is_remote(folder) and not folder.startswith("/"):
        folder = f"{data_dir.rstrip('/')}/{folder}"
    missing = f"{folder} is missing: it must be a webdataset of clip_benchmark's, or have a folder of images a class"
    fields = {"key": key, "name": str(entry.get("name", key)), "kind": kind, "folder": folder, "main_metric": metric}
    return Task(**fields, size=entry.get("size"), missing_message=missing)


def list_tasks(groups: Iterable[str] = DATACOMP_GROUPS, *, sample: bool = False) -> dict[str, dict[str, Any]]:
    """Return task key -> fields of groups or keys, in the format of DataComp's ``tasklist.yml``.

    ``sample``: only the first task of each. ``size`` is left out, as it depends on how much of the pool exists.
    """
    entries = {}
    for task in (task for name in groups for task in find_tasks(name, "")[: 1 if sample else None]):
        entry = entries[task.key] = {"name": task.name, "main_metric": task.main_metric}
        if "/datacompnet/" in task.key:
            entry |= {"num_classes": 1000, "random_score": 0.001}
        entry["tags"] = ["tic", "retrieval"] if task.kind == "retrieval" else ["tic"]
    return entries
