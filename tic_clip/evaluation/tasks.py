"""What a model is evaluated on: the tasks of the benchmarks, and static ones from a task list.

Keys are ``tic/{dataset}/{task}/{cadence}/{period}``, with data in
``{data_dir}/tic/{dataset}/{cadence}/eval/{task}/{period}/``. Any other key is a static task: as in DataComp's
``tasklist.yml``, its data lie in ``{data_dir}/wds_{key}_test/``, or in the ``folder`` that its line names.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, Benchmark
from tic_clip.evaluation.results import task_key
from tic_clip.metrics import KS, MAIN_METRIC
from tic_clip.storage import is_remote

METRICS = {
    "retrieval": ("mean_recall@1", *(f"{which}_retrieval_recall@{k}" for which in ("image", "text") for k in KS)),
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
}
"""Kinds of tasks, and what can be the main metric of each."""

FIELDS = ("folder", "kind", "main_metric", "name", "num_classes", "random_score", "size", "tags", "time")
"""What a line of a task list may say; the last five are DataComp's, of which ``size`` is checked here."""

DATACOMP_GROUPS = tuple(
    f"tic/datacomp/{task}/{cadence}" for cadence in ("yearly", "monthly") for task in ("retrieval", "datacompnet")
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation set: its key, its name in the tables, its kind (of ``METRICS``), its folder and main metric.

    ``size`` is how many samples it must have, where a task list says so.
    """

    key: str
    name: str
    kind: str
    folder: str
    main_metric: str
    size: int | None = None


def task_of(key: str, data_dir: str) -> Task:
    """The task of a benchmark with a key.

    Raises:
        TicError: no benchmark has it.
    """
    for benchmark in BENCHMARKS.values():
        for task in tasks_of(benchmark, data_dir):
            if key == task.key:
                return task
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
        main_metric=MAIN_METRIC[kind],
    )


def without_data(task: Task) -> str:
    """What to say of a task whose folder is missing."""
    for benchmark in BENCHMARKS.values():
        data_dir, found, _ = task.folder.partition(f"/{benchmark.root}/eval/")
        if found and task.key.startswith("tic/"):
            return benchmark.missing_data_message(task.folder, data_dir or "/")
    return f"{task.folder} is missing: it must be a webdataset of clip_benchmark's, or a folder of pictures a class"


def read_tasklist(path: str, data_dir: str) -> list[Task]:
    """The tasks of a YAML file, task key -> what there is to say of it; a key may also name all periods of a task.

    Raises:
        TicError: it is missing, is no such file, or says what can't be.
    """
    import yaml

    if not Path(path).exists():
        raise TicError(f"{path} is missing: dataset_creation/tic-datacomp/generate_tasklist.py writes a list of tasks")
    try:
        entries = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TicError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, dict) or not entries:
        raise TicError(f"{path} is no list of tasks: its top level must have task keys")
    try:
        return [task for key, entry in entries.items() for task in _listed(key, entry, data_dir)]
    except TicError as error:
        raise TicError(f"{path}: {error}") from None


def _listed(key: Any, entry: Any, data_dir: str) -> Iterator[Task]:
    """The tasks that a line of a task list stands for."""
    if not isinstance(key, str) or not isinstance(entry, dict | None):
        raise TicError(f"unknown task {key!r}; a line is a key, such as imagenet1k, and a table of what to say of it")
    if not key.startswith("tic/"):
        yield static_task(key, entry or {}, data_dir)
        return
    group = [
        task
        for benchmark in BENCHMARKS.values()
        for task in tasks_of(benchmark, data_dir)
        if task.key.rpartition("/")[0] == key
    ]
    yield from group or [task_of(key, data_dir)]


def static_task(key: str, entry: dict[str, Any], data_dir: str) -> Task:
    """A task that is of no benchmark: a webdataset as clip_benchmark has them, or pictures in a folder a class.

    Raises:
        TicError: ``entry`` says what it can't, or wants a metric that is only DataComp's.
    """
    unknown = [field for field in entry if field not in FIELDS]
    if unknown:
        raise TicError(f"task {key} has {unknown[0]!r}; a task may have {', '.join(FIELDS)}")
    kind = entry.get("kind", "retrieval" if key.startswith("retrieval/") else "classification")
    if kind not in METRICS:
        raise TicError(f"task {key} is of kind {kind!r}; the kinds are {', '.join(METRICS)}")
    metric = entry.get("main_metric", MAIN_METRIC[kind])
    if metric not in METRICS[kind] or key.startswith(("wilds/", "fairness/", "misc/")):
        known = ", ".join(METRICS[kind])
        raise TicError(f"task {key} needs DataComp's own evaluate.py; a {kind} task here has {known}")
    if entry.get("size") is not None and type(entry["size"]) is not int:
        raise TicError(f"task {key} has a size of {entry['size']!r}, which is no number of samples")
    folder = str(entry.get("folder", f"wds_{key.replace('/', '-')}_test"))
    if not is_remote(folder) and not folder.startswith("/"):
        folder = f"{data_dir.rstrip('/')}/{folder}"
    return Task(
        key=key,
        name=str(entry.get("name", key)),
        kind=kind,
        folder=folder,
        main_metric=metric,
        size=entry.get("size"),
    )


def list_tasks(groups: Iterable[str] = DATACOMP_GROUPS, *, sample: bool = False) -> dict[str, dict[str, Any]]:
    """Return a ``tasklist.yml`` as DataComp's evaluate.py reads it: task key -> name, main metric, number of classes.

    Args:
        groups: groups such as ``tic/datacomp/retrieval/yearly``, or keys of single tasks, of any benchmark.
        sample: only the first task of each group.

    Raises:
        TicError: unknown group or task.
    """
    tasks = [task for benchmark in BENCHMARKS.values() for task in tasks_of(benchmark, "")]
    entries = {}
    for name in groups:
        chosen = [task for task in tasks if name in (task.key, _group(task))]
        if not chosen:
            known = ", ".join(dict.fromkeys(map(_group, tasks)))
            raise TicError(f"unknown evaluation task {name!r}; the groups are {known}")
        entries |= {task.key: _entry(task) for task in chosen[: 1 if sample else None]}
    return entries


def _group(task: Task) -> str:
    return task.key.rpartition("/")[0]


def _entry(task: Task) -> dict[str, Any]:
    """Return what DataComp reads of a task; ``size`` is left out, as it depends on how much of the pool exists."""
    entry = {"name": task.name, "main_metric": MAIN_METRIC[task.kind]}
    if task.kind == "retrieval":
        return {**entry, "tags": ["tic", "retrieval"]}
    classes = {"num_classes": 1000, "random_score": 0.001} if "/datacompnet/" in task.key else {}
    return {**entry, **classes, "tags": ["tic"]}
