"""The results of runs and models as one tidy DataFrame, and the summary of each that summary.json holds."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.metrics import MAIN_METRIC, transfer
from tic_clip.results import RESULTS, read_results, task_key
from tic_clip.storage import to_path

STATIC = "static"
"""The ``task`` of results that belong to no period; their ``period`` is the task's key."""
DATA = ("num_samples", "coverage", "dropped", "nonfinite")
FIELDS = ("method", "scale", "filter", "seed", "settings", "family", "samples_seen", "macs_seen", *DATA)
VERSIONS = ("pins", "precision", "device")


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of a report, of one benchmark.

    ``frame`` has a row for the last result of each run or model, step and task: ``run`` (the name), ``step`` ("" of a
    model that is not a run), ``task``, ``period``, ``value`` (a share of 1, NaN if missing), ``low``, ``high`` (of the
    95 % interval), and ``FIELDS`` and ``VERSIONS`` as in the line.
    """

    benchmark: Benchmark
    frame: pd.DataFrame
    runs: list[str]
    models: list[str]

    @property
    def names(self) -> list[str]:
        """Return runs, then models."""
        return self.runs + self.models

    @property
    def single(self) -> str | None:
        """Return the only run, if there is nothing else."""
        return self.runs[0] if len(self.runs) == 1 and not self.models else None

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that have a value, in the benchmark's order."""
        return self.tasks_of(self.names)

    def tasks_of(self, names: list[str]) -> list[str]:
        """Return the tasks on which any of ``names`` has a value, in the benchmark's order."""
        evaluated = set(self.frame["task"][self.frame["value"].notna() & self.frame["run"].isin(names)])
        return [task for task in self.benchmark.tasks if task in evaluated]

    def steps(self, name: str) -> list[str]:
        """Return the steps of a run, [""] for a model."""
        return [step.name for step in self.benchmark.steps] if name in self.runs else [""]

    def rows(self, name: str) -> pd.DataFrame:
        """Return the rows of one run or model."""
        return self.frame[self.frame["run"] == name]

    def about(self, name: str) -> pd.Series:
        """Return a row of a run or model; all have the same method and scale."""
        return self.rows(name).iloc[0]

    def static_keys(self, names: list[str]) -> list[str]:
        """Return the static tasks of any of ``names``."""
        rows = self.frame[(self.frame["task"] == STATIC) & self.frame["run"].isin(names)]
        return list(dict.fromkeys(rows["period"]))

    def matrix(self, name: str, task: str, column: str = "value") -> pd.DataFrame:
        """Return a (steps, periods) table of a task of a run or model; its columns are the keys for ``STATIC``."""
        rows, periods = self.rows(name), list(self.benchmark.periods)
        if task == STATIC:
            periods = self.static_keys(self.names)
        table = rows[rows["task"] == task].pivot(index="step", columns="period", values=column)
        return table.reindex(index=self.steps(name), columns=periods)

    def transfer(self, name: str, task: str) -> dict[str, float]:
        """Return the ``id``, ``backward`` and ``forward`` of a run's task, NaN where a cell is missing."""
        if name not in self.runs:
            return dict.fromkeys(("id", "backward", "forward"), math.nan)
        return transfer(self.average_periods(self.matrix(name, task)))

    def average_periods(self, matrix: pd.DataFrame) -> np.ndarray:
        """Return the (steps, steps) means over each step's periods; a mean over a missing cell is missing."""
        ends = np.cumsum([len(step.periods) for step in self.benchmark.steps])
        parts = np.split(matrix.to_numpy(dtype=float), ends[:-1], axis=1)
        return np.stack([part.mean(axis=1) for part in parts], axis=1)

    def spent(self, name: str, column: str) -> pd.Series:
        """Return the ``samples_seen`` or ``macs_seen`` up to each step of a run."""
        rows = self.rows(name).drop_duplicates("step", keep="last").set_index("step")
        return rows[column].reindex(self.steps(name))

    def last_step(self, name: str) -> str:
        """Return the last step that has any result, the first without any."""
        rows = self.rows(name)
        finished = set(rows["step"][rows["value"].notna() | rows["samples_seen"].notna()])
        return ([step for step in self.steps(name) if step in finished] or self.steps(name))[-1 if finished else 0]

    def static(self, name: str) -> pd.Series:
        """Return the values of the static tasks, of a run those of its last step."""
        return self.matrix(name, STATIC).loc[self.last_step(name)]


def load_results(folders: list) -> Results:
    """Read ``eval_results.jsonl`` of each folder.

    Raises:
        TicError: a folder has no results that can be reported, or they are not comparable.
    """
    runs, models, benchmarks, versions = {}, {}, set(), {}
    for name, folder in zip(name_runs(folders), folders, strict=True):
        path = to_path(folder) / RESULTS
        if not path.exists():
            raise TicError(f"{path} is missing: run scripts/evaluate.py first")
        try:
            lines = _read_latest(path)
            steps, others = ([line for line in lines if is_run == (line["step"] != "")] for is_run in (True, False))
            for part in filter(None, (steps, others)):
                benchmarks.add(_only_value(part, "benchmark"))
            if steps:
                _only_value(steps, "method"), _only_value(steps, "scale")
                runs[name] = _make_rows(steps, name)
            for model in dict.fromkeys(line["model_name"] for line in others):
                unique = model if model not in models else f"{name}: {model}"
                models[unique] = _make_rows([line for line in others if line["model_name"] == model], unique)
        except TicError as error:
            raise error if str(path) in str(error) else TicError(f"{path}: {error}") from None
        versions |= {line.get("metric_version") or 1: path for line in lines}
    if len(versions) > 1:
        listed = ", ".join(f"{version} in {path}" for version, path in sorted(versions.items()))
        raise TicError(
            f"results of several metric versions can't be compared ({listed}): run scripts/evaluate.py again"
        )
    if len(benchmarks) > 1:
        raise TicError(f"cannot compare runs of different benchmarks: {', '.join(sorted(benchmarks))}")
    frame = pd.DataFrame([row for part in (runs | models).values() for row in part], dtype=object)
    frame = frame.astype(dict.fromkeys(("value", "low", "high"), float))
    return Results(benchmark=get_benchmark(benchmarks.pop()), frame=frame, runs=list(runs), models=list(models))


def name_runs(folders: list) -> list[str]:
    """Return a name for each run: its folder's, or parent/name where two folders have the same name."""
    paths = [to_path(folder).absolute() if "://" not in str(folder) else to_path(folder) for folder in folders]
    short = [path.name for path in paths]
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if not names or len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def _read_latest(path: object) -> list[dict[str, Any]]:
    """Return the last line of each (step or model, task), without those of checkpoints inside a step."""
    latest = {}
    for line in read_results(path):
        line["model_name"] = (line.get("model") or {}).get("name") or "?"
        line["step"] = line.get("step") or ""
        if not line["step"] or line.get("final", True):
            latest[line["step"] or (line["model_name"],), line["key"]] = line
    if not latest:
        raise TicError("no result: run scripts/evaluate.py first")
    return list(latest.values())


def _only_value(lines: list[dict[str, Any]], name: str) -> str:
    values = sorted({str(line[name]) for line in lines if line.get(name) is not None})
    if len(values) != 1:
        listed = f"of several: {', '.join(values)}" if values else "of none"
        raise TicError(f"the results of a run must be of one {name}, these are {listed}")
    return values[0]


def _make_rows(lines: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the rows of the frame; tasks of other benchmarks have none."""
    benchmark = get_benchmark(lines[0]["benchmark"])
    places = {task_key(benchmark, task, each): (task, each) for task in benchmark.tasks for each in benchmark.periods}
    rows = []
    for line in lines:
        key = line["key"]
        if line["step"]:
            benchmark.step_index(line["step"])
        if key not in places and key.startswith(tuple(task_key(benchmark, task, "") for task in benchmark.tasks)):
            raise TicError(f"{key} is not of a period of {benchmark.name}: {', '.join(benchmark.periods)}")
        if key in places or not key.startswith("tic/"):
            task, period = places.get(key, (STATIC, key))
            value = line["metrics"].get("main_metric")
            low, high = line.get("ci95") or (None, None)
            value = value if value is not None and math.isfinite(value) else math.nan
            row = {"run": name, "step": line["step"], "task": task, "period": period, "value": value}
            rows.append({**row, "low": low, "high": high, **{field: line.get(field) for field in FIELDS + VERSIONS}})
    if not rows:
        raise TicError(f"no result of a task of {benchmark.name} or of a static one")
    return rows


def data_facts(results: Results) -> pd.DataFrame:
    """Return ``DATA`` by (run, task, period): of the last step, and the largest ``nonfinite``."""
    keys = ["run", "task", "period"]
    rows = results.frame[[*keys, *DATA]]
    worst = rows.assign(nonfinite=[count or 0 for count in rows["nonfinite"]]).groupby(keys)["nonfinite"].max()
    return rows.drop_duplicates(keys, keep="last").set_index(keys).assign(nonfinite=worst)


# What summary.json holds.


def summarize(results: Results) -> dict[str, Any]:
    """Return the summary of the single run, or of runs and models by name."""
    if results.single:
        return _summarize_run(results, results.single)
    parts = {
        "runs": {name: _summarize_run(results, name) for name in results.runs},
        "models": {name: _summarize_model(results, name) for name in results.models},
    }
    return {name: part for name, part in parts.items() if part}


def _summarize_run(results: Results, name: str) -> dict[str, Any]:
    rows, about = results.rows(name), results.about(name)
    common = {field: about[field] for field in ("filter", "seed", "settings") if rows[field].nunique(dropna=False) == 1}
    static = {
        key: _to_json(column) for key, column in results.matrix(name, STATIC)[results.static_keys([name])].items()
    }
    return {
        "benchmark": results.benchmark.name,
        **{field: str(about[field]) for field in ("method", "scale")},
        **{field: value for field, value in common.items() if value is not None},
        "steps": results.steps(name),
        "tasks": {task: _summarize_task(results, name, task) for task in results.tasks_of([name])},
        **({"static": static} if static else {}),
        **_summarize_data(results, name),
        **{column: _to_json(results.spent(name, column)) for column in ("samples_seen", "macs_seen")},
        "pins": _list_versions(rows),
    }


def _summarize_model(results: Results, name: str) -> dict[str, Any]:
    values = {task: results.matrix(name, task).loc[""] for task in results.tasks_of([name])}
    kinds = results.benchmark.tasks
    static = {key: _to_json(results.static(name))[i] for i, key in enumerate(results.static(name).index)}
    static = {key: static[key] for key in results.static_keys([name])}
    return {
        "benchmark": results.benchmark.name,
        "family": results.about(name)["family"],
        "tasks": {
            task: {"metric": MAIN_METRIC[kinds[task]], "periods": dict(zip(row.index, _to_json(row), strict=True))}
            for task, row in values.items()
        },
        **({"static": static} if static else {}),
        **_summarize_data(results, name),
        "pins": _list_versions(results.rows(name)),
    }


def _summarize_task(results: Results, name: str, task: str) -> dict[str, Any]:
    values = results.matrix(name, task)
    summary = {
        "metric": MAIN_METRIC[results.benchmark.tasks[task]],
        "matrix": _to_json(results.average_periods(values)),
    }
    summary |= {key: None if math.isnan(value) else value for key, value in results.transfer(name, task).items()}
    if len(results.benchmark.periods) != len(results.benchmark.steps):
        summary["periods_matrix"] = _to_json(values)
    low, high = (results.matrix(name, task, column).to_numpy() for column in ("low", "high"))
    if np.isfinite(low).any():
        pairs = np.stack([low, high], axis=-1).tolist()
        summary["ci95"] = [[None if math.isnan(pair[0]) else pair for pair in row] for row in pairs]
    return summary


def _summarize_data(results: Results, name: str) -> dict[str, Any]:
    """Return ``data``: what was scored of each period of each task; of static tasks, only what was left out."""
    data: dict[str, dict[str, Any]] = {}
    facts = data_facts(results).loc[[name]]
    for (_, task, period), row in facts.iterrows():
        told = {field: row[field] for field in DATA if row[field] or field not in ("dropped", "nonfinite")}
        told = {field: value for field, value in told.items() if value is not None}
        if {"dropped", "nonfinite"} & set(told) or (told and task != STATIC):
            data.setdefault(task, {})[period] = told
    return {"data": data} if data else {}


def _list_versions(rows: pd.DataFrame) -> dict[str, str]:
    """Return the version of each package, precision and device; all, if there are several."""
    versions: dict[str, dict[str, None]] = {}
    for pins, precision, device in zip(*(rows[column] for column in VERSIONS), strict=True):
        about = {"precision": precision, "device": device}
        for package, version in {**(pins or {}), **{key: value for key, value in about.items() if value}}.items():
            versions.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(found) for package, found in sorted(versions.items())}


def _to_json(values: pd.Series | pd.DataFrame | np.ndarray) -> list:
    """Return nested lists with None for a missing value."""
    values = np.asarray(values, dtype=object)
    return np.where(pd.isna(values), None, values).tolist()
