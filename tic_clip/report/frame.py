"""Results of runs and models as tidy DataFrames, and their summary for summary.json."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, Benchmark
from tic_clip.evaluation.results import RESULTS, read_results, task_key
from tic_clip.metrics import MAIN_METRIC, transfer
from tic_clip.runs import find_benchmark, read_plan
from tic_clip.storage import to_path
from tic_clip.timeline import span

STATIC = "static"
"""The ``task`` of results without a period; their ``period`` is the task's key."""
SPENT = ["samples_seen", "macs_seen"]
DATA = ["num_samples", "coverage", "dropped", "nonfinite"]
VERSIONS = ["pins", "precision", "device"]
FIELDS = ["key", "step", "metrics", "ci95", "chance", "method", "scale", "filter", "seed", "settings", "family"]
FIELDS += [*SPENT, *DATA, *VERSIONS, "data", "model"]
SETTINGS = {"filter": "filter", "scale": "scale", "model": "model", "samples": "samples a step"}
SETTINGS |= {"batch_size": "batch", "learning_rate": "learning rate", "sampling": "sampling"}
"""Settings of a plan that must be equal in runs that are compared -> their names in tables."""
CELL = ["step", "task", "period"]


class Task(NamedTuple):
    """A task of a benchmark; runs on another benchmark or cadence can be evaluated on it, too."""

    benchmark: Benchmark
    name: str

    @property
    def metric(self) -> str:
        """Return the name of the main metric."""
        return self.benchmark.main_metric(self.name)

    @property
    def periods(self) -> list[str]:
        """Return the periods in order of time."""
        return list(self.benchmark.periods)

    def periods_of(self, benchmark: Benchmark) -> list[list[str]]:
        """Return the periods of each step of a benchmark; of another benchmark's, those within the step's days."""
        if self.benchmark == benchmark:
            return [list(step.periods) for step in benchmark.steps]
        days = {period: span(period) for period in self.periods}
        steps = [span(step.name) for step in benchmark.steps]
        return [[each for each in days if start <= days[each][0] and days[each][1] <= end] for start, end in steps]


class Subject:
    """A run, a model that is not a run, or the mean of ``members``, runs that differ only in their seed.

    ``frame`` has a row for the last result of each step, task and period: the line's ``FIELDS``, and ``task`` (its
    label), ``period``, ``value`` (a share of 1, NaN if missing), ``low`` and ``high`` (of the 95 % interval).
    ``static`` and ``spent`` have a row for each step. ``known``: label -> task, all tasks of the report.
    """

    def __init__(
        self, name: str, folder: object, frame: pd.DataFrame, benchmark: Benchmark, known: dict[str, Task]
    ) -> None:
        self.name, self.folder, self.benchmark, self.frame, self.known = name, folder, benchmark, frame, known
        self.members = [self]
        self.is_run = bool(frame["step"].iloc[0])
        self.steps = [step.name for step in benchmark.steps] if self.is_run else [""]
        for step in set(frame["step"]) - {""}:
            benchmark.step_index(step)  # raises if there is no such step
        self.last_step = [step for step in self.steps if step in set(frame["step"])][-1]
        evaluated = set(frame["task"][frame["value"].notna()])
        self.tasks = [label for label in known if label in evaluated]
        self.about = frame.iloc[0]
        self.static = _pivot(frame, STATIC, "value").reindex(self.steps)
        self.spent = frame.drop_duplicates("step", keep="last").set_index("step")[SPENT].reindex(self.steps)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Return the plan of the run's first step and when its last was ``finished``; {} if there is none."""
        return read_plan(self.folder, self.steps) if self.is_run else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Return name in tables -> setting, from the plan, else from the results, else None."""
        seen = self.spent["samples_seen"].dropna()
        told = {key: self.about[key] for key in ("filter", "scale")}
        told["samples"] = round(seen.iloc[0] / (self.steps.index(seen.index[0]) + 1)) if len(seen) else None
        return {head: self.plan.get(key, told.get(key)) for key, head in SETTINGS.items()}

    def matrix(self, task: str, column: str = "value") -> pd.DataFrame:
        """Return a column of a task as a table (steps, periods)."""
        return _pivot(self.frame, task, column).reindex(index=self.steps, columns=self.known[task].periods)

    def half_widths(self, task: str) -> pd.DataFrame:
        """Return the half-widths of the 95 % intervals (steps, periods); NaN if none or all of the samples are hits."""
        values, widths = self.matrix(task), (self.matrix(task, "high") - self.matrix(task, "low")) / 2
        return widths.where((values > 0) & (values < 1) & (widths > 0))

    def chance(self, task: str) -> pd.Series:
        """Return the score of guessing on each period, NaN if not known."""
        rows = self.frame[self.frame["task"] == task].drop_duplicates("period").set_index("period")
        chance = rows["chance"].astype(float)
        if task in self.known and self.known[task].metric == MAIN_METRIC["retrieval"]:
            chance = chance.fillna(1 / rows["num_samples"].astype(float))
        return chance.reindex(self.known[task].periods)

    def mean_over(self, task: str, spans: Iterable[Iterable[str]]) -> np.ndarray:
        """Return the means (steps, spans) over the periods of each span; NaN if a result is missing."""
        return _mean_over(self.matrix(task), spans)

    def square_matrix(self, task: str) -> np.ndarray:
        """Return the (steps, steps) means over each step's periods."""
        return self.mean_over(task, self.known[task].periods_of(self.benchmark))

    def square_widths(self, task: str) -> np.ndarray:
        """Return the half-widths (steps, steps) of ``square_matrix``'s intervals; periods are independent."""
        spans = self.known[task].periods_of(self.benchmark)
        return np.sqrt(_mean_over(self.half_widths(task) ** 2, spans) / np.array([max(len(part), 1) for part in spans]))

    def transfer(self, task: str) -> dict[str, float]:
        """Return ``id``, ``backward`` and ``forward`` of a task; NaN of a model and if a cell is missing."""
        return transfer(self.square_matrix(task) if self.is_run else np.full((2, 2), np.nan))


def average(name: str, members: list[Subject]) -> Subject:
    """Return the mean of runs; a cell is missing if one of them lacks it."""
    frame = pd.concat([one.frame for one in members])
    cells, first = frame.groupby(CELL, sort=False), frame.drop_duplicates(CELL).set_index(CELL)
    for column in ("value", "low", "high"):
        first[column] = cells[column].mean().where(cells[column].count() == len(members))
    mean = Subject(name, members[0].folder, first.reset_index(), members[0].benchmark, members[0].known)
    mean.members = members
    return mean


class Results:
    """All results of a report: ``runs``, ``models`` that are not runs, ``groups`` (means over seeds) and ``rows``.

    ``benchmark`` is the first run's; the labels of other benchmarks' tasks name them.
    """

    def __init__(self, subjects: list[Subject]) -> None:
        self.runs = [one for one in subjects if one.is_run]
        self.models = [one for one in subjects if not one.is_run]
        self.subjects = self.runs + self.models
        self.groups = group_seeds(self.runs)
        self.rows = self.groups + self.models
        self.single = self.rows[0] if len(self.rows) == len(self.groups) == 1 else None  # only one row, a run
        self.tasks = {
            label: task for label, task in subjects[0].known.items() if any(label in one.tasks for one in subjects)
        }
        self.benchmark = next(iter(self.tasks.values())).benchmark if self.tasks else subjects[0].benchmark
        self.static_keys = list(dict.fromkeys(key for one in self.subjects for key in one.static))
        titles = dict.fromkeys(task.benchmark.title for task in self.tasks.values()) or {self.benchmark.title: None}
        self.title = ", ".join(titles)

    @cached_property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Return the lowest and highest value of each task, the ends of the colour scale."""
        grids = {task: [row.matrix(task).to_numpy(float).ravel() for row in self.rows] for task in self.tasks}
        values = {task: np.concatenate(grid) for task, grid in grids.items()}
        return {task: (float(np.nanmin(part)), float(np.nanmax(part))) for task, part in values.items()}


def group_seeds(runs: list[Subject]) -> list[Subject]:
    """Return the runs, with those that differ only in their seed replaced by their mean."""
    alike: dict[tuple, list[Subject]] = {}
    for run in runs:
        settings = run.about[["method", "scale", "filter", "settings"]].map(str)
        is_known = run.about[["settings", "seed"]].notna().all()
        alike.setdefault((*settings, *map(str, run.spent["samples_seen"])) if is_known else (run.name,), []).append(run)
    groups = []
    for members in alike.values():
        if len({run.about["seed"] for run in members}) < len(members) or len(members) == 1:  # a seed is there twice
            groups += members
            continue
        short = {re.sub(r"[-_/]?(seed)?[-_]?\d+$", "", run.name) for run in members}
        taken = {run.name for run in runs if run not in members} | {one.name for one in groups} | {""}
        name = f"{members[0].name} and {len(members) - 1} more"
        groups.append(average(short.pop() if len(short) == 1 and not short & taken else name, members))
    return groups


def load_results(folders: list) -> Results:
    """Read ``eval_results.jsonl`` of each folder; raise a TicError if there is none or they are not comparable."""
    read, versions, data = [], {}, defaultdict(dict)
    for name, folder in zip(_name_runs(folders), folders, strict=True):
        path = to_path(folder) / RESULTS
        results = read_results(path)
        try:
            benchmark, groups = _split_lines(folder, results)
        except TicError as error:
            raise TicError(f"{path}: {error}") from None
        read += [(name, model, folder, benchmark, lines) for model, lines in groups.items()]
        for line in (line for lines in groups.values() for line in lines):
            versions[line.get("metric_version", 1)] = path
            data[line["key"]] |= {line["data"]: name} if "data" in line else {}
    if len(versions) > 1:
        listed = ", ".join(f"{value} in {path}" for value, path in sorted(versions.items()))
        raise TicError(f"can't compare {listed}: these are different metric versions: run scripts/evaluate.py again")
    cells = _name_cells([(benchmark, line["key"]) for *_, benchmark, lines in read for line in lines])
    for key, names in data.items():
        if len(names) > 1:
            what = ", ".join(cells.get(key, ("", key))[1:])
            raise TicError(f"{', '.join(dict.fromkeys(names.values()))}: evaluated on different data of {what}")
    known = {label: task for task, label, _ in cells.values()}
    subjects: dict[str, Subject] = {}
    for name, model, folder, benchmark, lines in read:
        label = model or name
        label = f"{name}: {label}" if label in subjects else label
        try:
            subjects[label] = Subject(label, folder, _make_frame(lines, benchmark, cells), benchmark, known)
        except TicError as error:
            raise TicError(f"{to_path(folder) / RESULTS}: {error}") from None
    return Results(list(subjects.values()))


def _name_cells(keys: list[tuple[Benchmark, str]]) -> dict[str, tuple[Task, str, str]]:
    """Return key -> task, label and period; labels name the benchmark if it is not the first."""
    used, cells = {key for _, key in keys}, {}
    for benchmark in dict.fromkeys([benchmark.name for benchmark, _ in keys] + list(BENCHMARKS)):
        table = next((one for one, _ in keys if one.name == benchmark), BENCHMARKS.get(benchmark))
        names = {task_key(table, task, period): (task, period) for task in table.tasks for period in table.periods}
        found = names if used & names.keys() - cells.keys() else {}
        is_first = not cells
        for key, (task, period) in found.items():
            cells.setdefault(key, (Task(table, task), task if is_first else f"{task} ({table.name})", period))
    return cells


def _name_runs(folders: list) -> list[str]:
    paths = [to_path(folder).absolute() for folder in folders]
    short = [path.name for path in paths]  # or parent/name where two folders have the same name
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def _split_lines(folder: object, lines: list[dict[str, Any]]) -> tuple[Benchmark, dict[str, list[dict[str, Any]]]]:
    """Return the benchmark, and model -> the last line of each task (and step); a run is the model ""."""
    of_steps = [line for line in lines if line.get("step")]
    for field, checked in (("benchmark", of_steps or lines[:1]), ("method", of_steps), ("scale", of_steps)):
        values = sorted({str(line.get(field)) for line in checked})
        if values[1:] or "None" in values:
            raise TicError(f"the results of a run must be of one {field}, not {', '.join(values)}")
    groups: dict[str, dict[tuple, dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["key"]):  # independent of which process wrote first
        if line.get("final", True) or not line.get("step"):
            model = "" if line.get("step") else line.get("model", {}).get("name", "?")
            groups.setdefault(model, {})[line.get("step"), line["key"]] = line
    if not groups:
        raise TicError("no result: run scripts/evaluate.py first")
    last_lines = {model: list(group.values()) for model, group in groups.items()}
    return find_benchmark(folder, (of_steps or lines)[0]["benchmark"]), last_lines


def _make_frame(lines: list[dict[str, Any]], benchmark: Benchmark, cells: dict[str, tuple]) -> pd.DataFrame:
    """Return a row for each line with a key in ``cells`` or of a static task; warn of others and drop them."""
    used = [line for line in lines if line["key"] in cells or not line["key"].startswith("tic/")]
    if not used:
        raise TicError(f"no result of a task of {benchmark.name} or of a static one")
    if len(used) < len(lines):
        logging.warning("%d results of tasks of no known benchmark are left out", len(lines) - len(used))
    frame = pd.DataFrame([[line.get(field) for field in FIELDS] for line in used], columns=FIELDS, dtype=object)
    frame[["task", "period"]] = [cells[key][1:] if key in cells else (STATIC, key) for key in frame["key"]]
    frame["value"] = np.array([metrics.get("main_metric") for metrics in frame["metrics"]], dtype=float)
    frame[["low", "high"]] = np.array([interval or (None, None) for interval in frame["ci95"]], dtype=float)
    frame["step"] = frame["step"].fillna("")
    return frame.replace({"value": {np.inf: np.nan, -np.inf: np.nan}})


def _mean_over(values: pd.DataFrame, spans: Iterable[Iterable[str]]) -> np.ndarray:
    means = [values[list(part)].mean(axis=1, skipna=False).to_numpy() for part in spans]
    return np.stack(means, axis=1).astype(float)


def _pivot(frame: pd.DataFrame, task: str, column: str) -> pd.DataFrame:
    rows = frame[frame["task"] == task]
    return rows.pivot(index="step", columns="period", values=column).reindex(columns=rows["period"].unique())


def summarize(one: Subject) -> dict[str, Any]:
    """Return the entry of a run or model in summary.json."""
    static = {key: _to_json(column) for key, column in one.static.items()}
    table = one.benchmark if one.is_run or not one.tasks else one.known[one.tasks[0]].benchmark
    summary = {"benchmark": table.name}
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
    values, summary = one.matrix(task), {"metric": one.known[task].metric}
    if not one.is_run:
        return summary | {"periods": dict(zip(values.columns, _to_json(values)[0], strict=True))}
    summary["matrix"] = _to_json(one.square_matrix(task))
    summary |= {key: None if math.isnan(value) else value for key, value in one.transfer(task).items()}
    if [[period] for period in values] != one.known[task].periods_of(one.benchmark):
        summary["periods_matrix"] = _to_json(values)
    if one.matrix(task, "low").notna().any(axis=None):
        summary["ci95"] = [[pair or None for pair in row] for row in _to_json(one.matrix(task, "ci95"))]
    return summary


def _collect_data(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return task -> period -> ``DATA``, with the largest ``nonfinite``; of static tasks, only with dropped samples."""
    data: dict[str, dict[str, Any]] = {}
    for (task, period), rows in frame.groupby(["task", "period"], sort=False):
        facts = rows.iloc[-1][DATA].to_dict() | {"nonfinite": max(count or 0 for count in rows["nonfinite"])}
        facts = {key: value for key, value in facts.items() if value}
        if facts.keys() & {"dropped", "nonfinite"} or (facts and task != STATIC):
            data.setdefault(task, {})[period] = facts
    return data


def _list_versions(frame: pd.DataFrame) -> dict[str, str]:
    """Return the versions of each package, precision and device, joined if there are several."""
    versions: dict[str, dict[str, None]] = {}
    for pins, precision, device in frame[VERSIONS].itertuples(index=False):
        for package, version in {**(pins or {}), "precision": precision, "device": device}.items():
            if version:
                versions.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(found) for package, found in sorted(versions.items())}


def _to_json(values: pd.Series | pd.DataFrame | np.ndarray) -> list:
    """Return nested lists with None for missing values."""
    values = np.asarray(values, dtype=object)
    return np.where(pd.isna(values), None, values).tolist()
