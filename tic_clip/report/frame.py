"""The results of runs and models as tidy DataFrames, and the summary of each that summary.json holds."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.evaluation.results import RESULTS, read_results, task_key
from tic_clip.metrics import MAIN_METRIC, transfer
from tic_clip.runs import find_benchmark
from tic_clip.storage import to_path

STATIC = "static"
"""The ``task`` of results that belong to no period; their ``period`` is the task's key."""
ABOUT = ("method", "scale", "filter", "seed", "settings", "family")
SPENT = ("samples_seen", "macs_seen")
DATA = ("num_samples", "coverage", "dropped", "nonfinite")
VERSIONS = ("pins", "precision", "device")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run, or a model that is not a run.

    ``frame`` has a row for the last result of each step and task: ``step``, ``task``, ``period``, ``value`` (a share of
    1, NaN if missing), ``low``, ``high`` (of the 95 % interval), and ``ABOUT``, ``SPENT``, ``DATA`` and ``VERSIONS`` as
    in the line. Of the other tables each row is a step.
    """

    name: str
    folder: object
    benchmark: Benchmark
    is_run: bool
    steps: list[str]  # [""] of a model
    last_step: str  # with any result
    tasks: list[str]  # with a value
    frame: pd.DataFrame
    about: pd.Series
    static: pd.DataFrame
    spent: pd.DataFrame

    def matrix(self, task: str, column: str = "value") -> pd.DataFrame:
        """Return the (steps, periods) table of a task."""
        return _pivot(self.frame, task, column).reindex(index=self.steps, columns=list(self.benchmark.periods))

    def square_matrix(self, task: str) -> np.ndarray:
        """Return the (steps, steps) means over each step's periods; a mean over a missing cell is missing."""
        values, steps = self.matrix(task), self.benchmark.steps
        return np.stack([values[list(step.periods)].mean(axis=1, skipna=False) for step in steps], axis=1)

    def transfer(self, task: str) -> dict[str, float]:
        """Return the ``id``, ``backward`` and ``forward`` of a task, NaN of a model and where a cell is missing."""
        return transfer(self.square_matrix(task) if self.is_run else np.full((2, 2), np.nan))


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of a report, of one benchmark: runs, then models that are not runs."""

    benchmark: Benchmark
    subjects: list[Subject]
    runs: list[Subject]
    models: list[Subject]
    single: Subject | None  # the only run, if there is nothing else
    tasks: list[str]  # with a value, in the benchmark's order
    static_keys: list[str]


def load_results(folders: list) -> Results:
    """Read ``eval_results.jsonl`` of each folder; raise a TicError if there is none or they are not comparable."""
    subjects, versions = {}, {}
    for name, folder in zip(_name_runs(folders), folders, strict=True):
        path = to_path(folder) / RESULTS
        lines = [line for line in read_results(path) if line.get("final", True) or not line.get("step")]
        try:
            benchmark, parts = _split_subjects(folder, lines)
            for model, part in parts.items():
                label = model or name
                label = f"{name}: {label}" if label in subjects else label
                subjects[label] = _make_subject(label, folder, part, benchmark)
        except TicError as error:
            raise TicError(f"{path}: {error}") from None
        versions |= {line.get("metric_version") or 1: path for part in parts.values() for line in part}
    if len(versions) > 1:
        listed = ", ".join(f"{version} in {path}" for version, path in sorted(versions.items()))
        raise TicError(f"can't compare results of several metric versions ({listed}): run scripts/evaluate.py again")
    if len(benchmarks := sorted({one.benchmark.name for one in subjects.values()})) > 1:
        raise TicError(f"cannot compare runs of different benchmarks: {', '.join(benchmarks)}")
    runs, models = ([one for one in subjects.values() if one.is_run == is_run] for is_run in (True, False))
    return Results(
        benchmark=benchmark,
        subjects=runs + models,
        runs=runs,
        models=models,
        single=runs[0] if len(subjects) == len(runs) == 1 else None,
        tasks=[task for task in benchmark.tasks if any(task in one.tasks for one in subjects.values())],
        static_keys=list(dict.fromkeys(key for one in runs + models for key in one.static)),
    )


def _name_runs(folders: list) -> list[str]:
    paths = [to_path(folder).absolute() if "://" not in str(folder) else to_path(folder) for folder in folders]
    short = [path.name for path in paths]  # or parent/name where two folders have the same name
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def _split_subjects(folder: object, lines: list[dict[str, Any]]) -> tuple[Benchmark, dict[str, list[dict[str, Any]]]]:
    """Return the benchmark, and the last line of each task (and step): of the run under "", of models by name."""
    if not lines:
        raise TicError("no result: run scripts/evaluate.py first")
    of_steps = [line for line in lines if line.get("step")]
    for field, checked in (("benchmark", lines), ("method", of_steps), ("scale", of_steps)):
        values = sorted({str(line[field]) for line in checked if line.get(field) is not None})
        if checked and len(values) != 1:
            listed = f"of several: {', '.join(values)}" if values else "of none"
            raise TicError(f"the results of a run must be of one {field}, these are {listed}")
    parts: dict[str, dict[tuple, dict[str, Any]]] = {}
    for line in lines:
        model = "" if line.get("step") else (line.get("model") or {}).get("name") or "?"
        parts.setdefault(model, {})[line.get("step"), line["key"]] = line
    return find_benchmark(folder, lines[0]["benchmark"]), {model: list(part.values()) for model, part in parts.items()}


def _make_subject(name: str, folder: object, lines: list[dict[str, Any]], benchmark: Benchmark) -> Subject:
    periods = {task_key(benchmark, task, each): (task, each) for task in benchmark.tasks for each in benchmark.periods}
    folders = tuple(task_key(benchmark, task, "") for task in benchmark.tasks)
    rows = []
    for line in lines:
        key, value, interval = line["key"], line["metrics"].get("main_metric"), line.get("ci95") or (None, None)
        step = benchmark.steps[benchmark.step_index(line["step"])].name if line.get("step") else ""
        if key not in periods and key.startswith(folders):
            raise TicError(f"{key} is not of a period of {benchmark.name}: {', '.join(benchmark.periods)}")
        if key in periods or not key.startswith("tic/"):  # else of another benchmark
            value = value if value is not None and math.isfinite(value) else math.nan
            fields = [line.get(field) for field in ABOUT + SPENT + DATA + VERSIONS]
            rows.append([step, *periods.get(key, (STATIC, key)), value, *interval, *fields])
    if not rows:
        raise TicError(f"no result of a task of {benchmark.name} or of a static one")
    columns = ["step", "task", "period", "value", "low", "high", *ABOUT, *SPENT, *DATA, *VERSIONS]
    frame = pd.DataFrame(rows, columns=columns, dtype=object).astype({"value": float, "low": float, "high": float})
    evaluated = set(frame["task"][frame["value"].notna()])
    finished = set(frame["step"][frame["value"].notna() | frame["samples_seen"].notna()])
    steps = [each.name for each in benchmark.steps] if rows[0][0] else [""]
    return Subject(
        name=name,
        folder=folder,
        benchmark=benchmark,
        is_run=steps != [""],
        steps=steps,
        last_step=[step for step in steps if step in finished or step == steps[0]][-1],
        tasks=[task for task in benchmark.tasks if task in evaluated],
        frame=frame,
        about=frame.iloc[0],
        static=_pivot(frame, STATIC, "value").reindex(steps),
        spent=frame.drop_duplicates("step", keep="last").set_index("step")[list(SPENT)].reindex(steps),
    )


def _pivot(frame: pd.DataFrame, task: str, column: str) -> pd.DataFrame:
    rows = frame[frame["task"] == task]
    return rows.pivot(index="step", columns="period", values=column).reindex(columns=rows["period"].unique())


def summarize(one: Subject) -> dict[str, Any]:
    """Return what summary.json holds of a run or model."""
    summary = {"benchmark": one.benchmark.name}
    if one.is_run:
        common = [key for key in ("filter", "seed", "settings") if one.frame[key].nunique(dropna=False) == 1]
        summary |= {key: str(one.about[key]) for key in ("method", "scale")}
        summary |= {key: one.about[key] for key in common if one.about[key] is not None} | {"steps": one.steps}
    else:
        summary["family"] = one.about["family"]
    summary["tasks"] = {task: _summarize_task(one, task) for task in one.tasks}
    static = {key: _to_json(column) for key, column in one.static.items()}
    parts = {
        "static": static if one.is_run else {key: values[0] for key, values in static.items()},
        "data": _collect_data(one.frame),
    }
    summary |= {key: part for key, part in parts.items() if part}
    summary |= {key: _to_json(one.spent[key]) for key in SPENT if one.is_run}
    return summary | {"pins": _list_versions(one.frame)}


def _summarize_task(one: Subject, task: str) -> dict[str, Any]:
    values = one.matrix(task)
    summary = {"metric": MAIN_METRIC[one.benchmark.tasks[task]]}
    if not one.is_run:
        return summary | {"periods": dict(zip(values.columns, _to_json(values)[0], strict=True))}
    summary["matrix"] = _to_json(one.square_matrix(task))
    summary |= {key: None if math.isnan(value) else value for key, value in one.transfer(task).items()}
    if len(one.benchmark.periods) != len(one.benchmark.steps):
        summary["periods_matrix"] = _to_json(values)
    intervals = np.stack([one.matrix(task, "low"), one.matrix(task, "high")], axis=-1)
    if np.isfinite(intervals).any():
        summary["ci95"] = [[None if pair[0] is None else pair for pair in row] for row in _to_json(intervals)]
    return summary


def _collect_data(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return ``DATA`` by task and period, with the largest ``nonfinite``; of static tasks, only what was left out."""
    data: dict[str, dict[str, Any]] = {}
    for task, period, *values in frame[["task", "period", *DATA]].itertuples(index=False):
        facts = {key: value for key, value in zip(DATA, values, strict=True) if value}
        worst = max(facts.get("nonfinite", 0), data.get(task, {}).get(period, {}).get("nonfinite", 0))
        facts |= {"nonfinite": worst} if worst else {}
        if {"dropped", "nonfinite"} & set(facts) or (facts and task != STATIC):
            data.setdefault(task, {})[period] = facts
    return data


def _list_versions(frame: pd.DataFrame) -> dict[str, str]:
    """Return the version of each package, precision and device; all, if there are several."""
    versions: dict[str, dict[str, None]] = {}
    for pins, precision, device in frame[list(VERSIONS)].itertuples(index=False):
        for package, version in {**(pins or {}), "precision": precision, "device": device}.items():
            if version:
                versions.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(found) for package, found in sorted(versions.items())}


def _to_json(values: pd.Series | pd.DataFrame | np.ndarray) -> list:
    """Return nested lists with None for a missing value."""
    values = np.asarray(values, dtype=object)
    return np.where(pd.isna(values), None, values).tolist()
