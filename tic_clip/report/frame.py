"""The results of runs and models as tidy DataFrames, and the summary of each that summary.json holds."""

import math
from collections.abc import Iterable
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
SPENT = ["samples_seen", "macs_seen"]
DATA = ["num_samples", "coverage", "dropped", "nonfinite"]
VERSIONS = ["pins", "precision", "device"]
FIELDS = ["key", "step", "metrics", "ci95", "method", "scale", "filter", "seed", "settings", "family"]
FIELDS += [*SPENT, *DATA, *VERSIONS]


class Subject:
    """A run, or a model that is not a run.

    ``frame`` has a row for the last result of each step and task: the line's ``FIELDS``, and ``task``, ``period``,
    ``value`` (a share of 1, NaN if missing), ``low`` and ``high`` (of the 95 % interval). Of the other tables each row
    is a step.
    """

    def __init__(self, name: str, folder: object, lines: list[dict[str, Any]], benchmark: Benchmark) -> None:
        self.name, self.folder, self.benchmark, self.frame = name, folder, benchmark, _make_frame(lines, benchmark)
        self.is_run = bool(lines[0].get("step"))
        self.steps = [step.name for step in benchmark.steps] if self.is_run else [""]
        self.last_step = [step for step in self.steps if step in set(self.frame["step"])][-1]
        evaluated = set(self.frame["task"][self.frame["value"].notna()])
        self.tasks = [task for task in benchmark.tasks if task in evaluated]
        self.about = self.frame.iloc[0]
        self.static = _pivot(self.frame, STATIC, "value").reindex(self.steps)
        self.spent = self.frame.drop_duplicates("step", keep="last").set_index("step")[SPENT].reindex(self.steps)

    def matrix(self, task: str, column: str = "value") -> pd.DataFrame:
        """Return the (steps, periods) table of a task."""
        return _pivot(self.frame, task, column).reindex(index=self.steps, columns=list(self.benchmark.periods))

    def mean_over(self, task: str, spans: Iterable[tuple[str, ...]]) -> np.ndarray:
        """Return the means (steps, spans) over the periods of each span; NaN if one is missing."""
        values = self.matrix(task)
        return np.stack([values[list(periods)].to_numpy().mean(axis=1) for periods in spans], axis=1)

    def square_matrix(self, task: str) -> np.ndarray:
        """Return the (steps, steps) means over each step's periods."""
        return self.mean_over(task, [step.periods for step in self.benchmark.steps])

    def transfer(self, task: str) -> dict[str, float]:
        """Return the ``id``, ``backward`` and ``forward`` of a task, NaN of a model and where a cell is missing."""
        return transfer(self.square_matrix(task) if self.is_run else np.full((2, 2), np.nan))


class Results:
    """All results of a report, of one benchmark: runs, then models that are not runs."""

    def __init__(self, subjects: list[Subject]) -> None:
        self.runs = [one for one in subjects if one.is_run]
        self.models = [one for one in subjects if not one.is_run]
        self.subjects = self.runs + self.models
        self.single = subjects[0] if len(subjects) == len(self.runs) == 1 else None  # the only run, and no model
        self.benchmark = subjects[0].benchmark
        self.tasks = [task for task in self.benchmark.tasks if any(task in one.tasks for one in subjects)]
        self.static_keys = list(dict.fromkeys(key for one in self.subjects for key in one.static))


def load_results(folders: list) -> Results:
    """Read ``eval_results.jsonl`` of each folder; raise a TicError if there is none or they are not comparable."""
    subjects, benchmarks, versions = {}, {}, {}
    for name, folder in zip(_name_runs(folders), folders, strict=True):
        path = to_path(folder) / RESULTS
        try:
            benchmark, groups = _split_lines(folder, read_results(path))
            for model, group in groups.items():
                label = model or name
                label = f"{name}: {label}" if label in subjects else label
                subjects[label] = Subject(label, folder, group, benchmark)
        except TicError as error:
            raise TicError(f"{path}: {error}") from None
        benchmarks[benchmark.name] = path
        versions |= {line.get("metric_version", 1): path for group in groups.values() for line in group}
    for field, paths in (("benchmarks", benchmarks), ("metric versions: run scripts/evaluate.py again", versions)):
        if len(paths) > 1:
            listed = ", ".join(f"{value} in {path}" for value, path in paths.items())
            raise TicError(f"can't compare {listed}: these are different {field}")
    return Results(list(subjects.values()))


def _name_runs(folders: list) -> list[str]:
    paths = [to_path(folder).absolute() for folder in folders]
    short = [path.name for path in paths]  # or parent/name where two folders have the same name
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def _split_lines(folder: object, lines: list[dict[str, Any]]) -> tuple[Benchmark, dict[str, list[dict[str, Any]]]]:
    """Return the benchmark, and the last line of each task (and step): of the run under "", of models by name."""
    of_steps = [line for line in lines if line.get("step")]
    for field, checked in (("benchmark", lines), ("method", of_steps), ("scale", of_steps)):
        values = sorted({str(line.get(field)) for line in checked})
        if values[1:] or "None" in values:
            raise TicError(f"the results of a run must be of one {field}, not {', '.join(values)}")
    groups: dict[str, dict[tuple, dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["key"]):  # whatever process was first
        if line.get("final", True) or not line.get("step"):
            model = "" if line.get("step") else line.get("model", {}).get("name", "?")
            groups.setdefault(model, {})[line.get("step"), line["key"]] = line
    if not groups:
        raise TicError("no result: run scripts/evaluate.py first")
    last_lines = {model: list(group.values()) for model, group in groups.items()}
    return find_benchmark(folder, lines[0]["benchmark"]), last_lines


def _make_frame(lines: list[dict[str, Any]], benchmark: Benchmark) -> pd.DataFrame:
    periods = {task_key(benchmark, task, each): (task, each) for task in benchmark.tasks for each in benchmark.periods}
    used = [line for line in lines if line["key"] in periods or not line["key"].startswith("tic/")]
    if not used:
        raise TicError(f"no result of a task of {benchmark.name} or of a static one")
    for step in {line["step"] for line in used if line.get("step")}:
        benchmark.step_index(step)  # raises if there is no such step
    frame = pd.DataFrame([[line.get(field) for field in FIELDS] for line in used], columns=FIELDS, dtype=object)
    frame[["task", "period"]] = [periods.get(key, (STATIC, key)) for key in frame["key"]]
    frame["value"] = np.array([metrics.get("main_metric") for metrics in frame["metrics"]], dtype=float)
    frame[["low", "high"]] = np.array([interval or (None, None) for interval in frame["ci95"]], dtype=float)
    frame["step"] = frame["step"].fillna("")
    return frame.replace({"value": {np.inf: np.nan, -np.inf: np.nan}})


def _pivot(frame: pd.DataFrame, task: str, column: str) -> pd.DataFrame:
    rows = frame[frame["task"] == task]
    return rows.pivot(index="step", columns="period", values=column).reindex(columns=rows["period"].unique())


def summarize(one: Subject) -> dict[str, Any]:
    """Return what summary.json holds of a run or model."""
    static = {key: _to_json(column) for key, column in one.static.items()}
    summary = {"benchmark": one.benchmark.name}
    if one.is_run:
        common = [key for key in ("filter", "seed", "settings") if one.frame[key].nunique(dropna=False) == 1]
        summary |= {key: str(one.about[key]) for key in ("method", "scale")}
        summary |= {key: one.about[key] for key in common if one.about[key] is not None} | {"steps": one.steps}
    else:
        summary["family"] = one.about["family"]
        static = {key: values[0] for key, values in static.items()}
    summary["tasks"] = {task: _summarize_task(one, task) for task in one.tasks}
    summary |= {key: part for key, part in (("static", static), ("data", _collect_data(one.frame))) if part}
    summary |= {key: _to_json(one.spent[key]) for key in SPENT if one.is_run}
    return summary | {"pins": _list_versions(one.frame)}


def _summarize_task(one: Subject, task: str) -> dict[str, Any]:
    values, summary = one.matrix(task), {"metric": MAIN_METRIC[one.benchmark.tasks[task]]}
    if not one.is_run:
        return summary | {"periods": dict(zip(values.columns, _to_json(values)[0], strict=True))}
    summary["matrix"] = _to_json(one.square_matrix(task))
    summary |= {key: None if math.isnan(value) else value for key, value in one.transfer(task).items()}
    if len(one.benchmark.periods) != len(one.benchmark.steps):
        summary["periods_matrix"] = _to_json(values)
    if one.matrix(task, "low").notna().any(axis=None):
        summary["ci95"] = [[pair or None for pair in row] for row in _to_json(one.matrix(task, "ci95"))]
    return summary


def _collect_data(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return ``DATA`` by task and period, with the largest ``nonfinite``; of static tasks, only what was left out."""
    data: dict[str, dict[str, Any]] = {}
    for (task, period), rows in frame.groupby(["task", "period"], sort=False):
        facts = rows.iloc[-1][DATA].to_dict() | {"nonfinite": max(count or 0 for count in rows["nonfinite"])}
        facts = {key: value for key, value in facts.items() if value}
        if facts.keys() & {"dropped", "nonfinite"} or (facts and task != STATIC):
            data.setdefault(task, {})[period] = facts
    return data


def _list_versions(frame: pd.DataFrame) -> dict[str, str]:
    """Return the version of each package, precision and device; all, if there are several."""
    versions: dict[str, dict[str, None]] = {}
    for pins, precision, device in frame[VERSIONS].itertuples(index=False):
        for package, version in {**(pins or {}), "precision": precision, "device": device}.items():
            if version:
                versions.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(found) for package, found in sorted(versions.items())}


def _to_json(values: pd.Series | pd.DataFrame | np.ndarray) -> list:
    """Return nested lists with None for a missing value."""
    values = np.asarray(values, dtype=object)
    return np.where(pd.isna(values), None, values).tolist()
