"""From result lines to summaries: what a run, or a model that is no run, has on every task. Pure but for reading.

A run's summary has its step x period values of each task, transfer, static results, samples and MACs; a model's (of
``--use_model``) has its values on the periods. The last line of one model and task counts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.evaluation.results import RESULTS, matrix, number, read_results, reduce_periods, task_key
from tic_clip.metrics import MAIN_METRIC, transfer
from tic_clip.storage import to_path

CONFIGURATION = ("filter", "seed", "settings")
FACTS = ("num_samples", "coverage", "dropped")


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """All that a report is about: summaries of runs and of single models, by name, of one benchmark."""

    benchmark: Benchmark
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def everything(self) -> dict[str, dict[str, Any]]:
        """Runs, then models."""
        return self.runs | self.models

    @property
    def tasks(self) -> list[str]:
        """The tasks that something was evaluated on, in the benchmark's order."""
        return [task for task in self.benchmark.tasks if any(task in one["tasks"] for one in self.everything.values())]

    @property
    def single(self) -> dict[str, Any] | None:
        """The only run, if there is nothing else."""
        return next(iter(self.runs.values())) if len(self.everything) == len(self.runs) == 1 else None

    def content(self) -> dict[str, Any]:
        """What summary.json holds: the one run, or runs and models by name."""
        if self.single:
            return self.single
        parts = {"runs": self.runs, "models": self.models}
        return {name: part for name, part in parts.items() if part}


def restore(content: dict[str, Any]) -> Summaries:
    """What the ``content`` of a summary.json was made of; a run that is there alone is called by its method."""
    several = {name: content[name] for name in ("runs", "models") if name in content}
    parts = several or {"runs": {content["method"]: content}}
    first = next(one for part in parts.values() for one in part.values())
    return Summaries(benchmark=get_benchmark(first["benchmark"]), **parts)


def read_all(folders: list) -> Summaries:
    """The summaries of all results in ``folders``.

    Raises:
        TicError: a folder has no results that can be reported, or they are not comparable.
    """
    runs, models, versions = {}, {}, {}
    for name, folder in zip(run_names(folders), folders, strict=True):
        path = to_path(folder) / RESULTS
        if not path.exists():
            raise TicError(f"{path} is missing: run scripts/evaluate.py first")
        try:
            results = read_results(path)
            steps = [line for line in results if line.get("step") is not None and line.get("final", True)]
            others = [line for line in results if line.get("step") is None]
            if not steps and not others:
                raise TicError("no result: run scripts/evaluate.py first")
            if steps:
                runs[name] = summarize(steps)
            for model, summary in summarize_models(others).items():
                models[model if model not in models else f"{name}: {model}"] = summary
            versions |= {_version(line): path for line in latest([*steps, *others])}
        except TicError as error:
            raise error if str(path) in str(error) else TicError(f"{path}: {error}") from None
    if len(versions) > 1:
        which = ", ".join(f"{version} in {path}" for version, path in sorted(versions.items()))
        raise TicError(f"results of several metric versions can't be compared ({which}): run scripts/evaluate.py again")
    benchmarks = sorted({one["benchmark"] for one in [*runs.values(), *models.values()]})
    if len(benchmarks) > 1:
        raise TicError(f"cannot compare runs of different benchmarks: {', '.join(benchmarks)}")
    return Summaries(benchmark=get_benchmark(benchmarks[0]), runs=runs, models=models)


def _version(line: dict[str, Any]) -> int:
    return line.get("metric_version") or 1


def latest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each (model or step, task)."""
    return list({(line.get("step"), _model(line), line["key"]): line for line in results}.values())


def _model(line: dict[str, Any]) -> str | None:
    return (line.get("model") or {}).get("name") if line.get("step") is None else None


def run_names(folders: list) -> list[str]:
    """A name for each run: its folder's, or parent/name where two folders have the same name."""
    paths = [to_path(folder).absolute() if "://" not in str(folder) else to_path(folder) for folder in folders]
    short = [path.name for path in paths]
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if not names or len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of one run's results, each of which has a step.

    Raises:
        TicError: they are not of one benchmark, method and scale, or of a step or period that the benchmark lacks.
    """
    benchmark = get_benchmark(_only(results, "benchmark"))
    names = {name: _only(results, name) for name in ("method", "scale")}
    results = latest(results)
    steps = [step.name for step in benchmark.steps]
    last = {line["step"]: line for line in results}
    scores = {task: matrix(results, benchmark, task) for task in benchmark.tasks}
    about = {name: value for name in CONFIGURATION if (value := _common(results, name)) is not None}
    return {
        "benchmark": benchmark.name,
        **names,
        **about,
        "steps": steps,
        "tasks": {
            task: _summarize_task(values, results, benchmark, task)
            for task, values in scores.items()
            if not np.isnan(values).all()
        },
        **_static(results, lambda lines: [_value(lines.get(step)) for step in steps]),
        **_data(results, benchmark),
        "samples_seen": [last.get(step, {}).get("samples_seen") for step in steps],
        "macs_seen": [last.get(step, {}).get("macs_seen") for step in steps],
        "pins": _pins(results),
    }


def summarize_models(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The summaries of models that are no run, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in latest(results):
        found.setdefault(_model(line) or "?", []).append(line)
    return {name: _summarize_model(lines) for name, lines in found.items()}


def _summarize_model(lines: list[dict[str, Any]]) -> dict[str, Any]:
    benchmark = get_benchmark(_only(lines, "benchmark"))
    by_key = {line["key"]: line for line in lines}
    tasks = {}
    for task, kind in benchmark.tasks.items():
        periods = {period: _value(by_key.get(task_key(benchmark, task, period))) for period in benchmark.periods}
        if any(value is not None for value in periods.values()):
            tasks[task] = {"metric": MAIN_METRIC[kind], "periods": periods}
    return {
        "benchmark": benchmark.name,
        "family": _common(lines, "family"),
        "tasks": tasks,
        **_static(lines, lambda each: _value(each.get(None))),
        **_data(lines, benchmark),
        "pins": _pins(lines),
    }


def _value(line: dict[str, Any] | None) -> float | None:
    value = number(line) if line else math.nan
    return None if math.isnan(value) else value


def _static(results: list[dict[str, Any]], read: Any) -> dict[str, Any]:
    """``static``: what ``read`` makes of {step or None: line} of each task that is of no period; {} without any."""
    keys: dict[str, dict[str | None, dict[str, Any]]] = {}
    for line in results:
        if not line["key"].startswith("tic/"):
            keys.setdefault(line["key"], {})[line.get("step")] = line
    return {"static": {key: read(lines) for key, lines in keys.items()}} if keys else {}


def _data(results: list[dict[str, Any]], benchmark: Benchmark) -> dict[str, Any]:
    """``data``: what was scored of each period of each task: samples, coverage, what was left out; {} if untold.

    Tasks that are of no period stand under ``static``, where there is more to say of them than the number of samples.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    where = {task_key(benchmark, task, each): (task, each) for task in benchmark.tasks for each in benchmark.periods}
    for line in results:
        task, period = where.get(line["key"], ("static", line["key"]))
        facts = {name: line[name] for name in FACTS if line.get(name) is not None and line[name] != {}}
        worst = max(line.get("nonfinite") or 0, found.get(task, {}).get(period, {}).get("nonfinite", 0))
        facts |= {"nonfinite": worst} if worst else {}
        if (task != "static" and facts) or {"dropped", "nonfinite"} & set(facts):
            found.setdefault(task, {})[period] = facts
    return {"data": found} if found else {}


def _only(results: list[dict[str, Any]], name: str) -> str:
    values = sorted({str(line[name]) for line in results if line.get(name) is not None})
    if len(values) != 1:
        found = f"of several: {', '.join(values)}" if values else "of none"
        raise TicError(f"the results of a run must be of one {name}, these are {found}")
    return values[0]


def _common(results: list[dict[str, Any]], name: str) -> Any:
    """The value that all results have, or None."""
    values = {line.get(name) for line in results}
    return values.pop() if len(values) == 1 else None


def _pins(results: list[dict[str, Any]]) -> dict[str, str]:
    """The version of each package, and precision and device; all, where a run was evaluated with several."""
    pins: dict[str, dict[str, None]] = {}
    for line in results:
        facts = {name: line[name] for name in ("precision", "device") if line.get(name)}
        for package, version in ({**(line.get("pins") or {}), **facts}).items():
            pins.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(versions) for package, versions in sorted(pins.items())}


def _summarize_task(values: np.ndarray, results: list[dict], benchmark: Benchmark, name: str) -> dict[str, Any]:
    """``values``: (num_steps, num_periods)."""
    reduced = reduce_periods(values, benchmark)
    task = {"metric": MAIN_METRIC[benchmark.tasks[name]], "matrix": _to_json(reduced)}
    task |= {name: None if math.isnan(value) else float(value) for name, value in transfer(reduced).items()}
    if len(benchmark.periods) != len(benchmark.steps):
        task["periods_matrix"] = _to_json(values)
    cells = {(line["step"], line["key"]): line.get("ci95") for line in results}
    keys = [task_key(benchmark, name, period) for period in benchmark.periods]
    intervals = [[cells.get((step.name, key)) for key in keys] for step in benchmark.steps]
    return task | ({"ci95": intervals} if any(any(row) for row in intervals) else {})


def _to_json(values: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in values]


def periods_matrix(task: dict[str, Any]) -> list[list[float | None]]:
    """The (num_steps, num_periods) values of a run's task."""
    return task.get("periods_matrix", task["matrix"])


def total(run: dict[str, Any], what: str) -> float | None:
    """The samples, or MACs, that a run has spent up to its last finished step."""
    return max((seen for seen in run.get(what) or [] if seen is not None), default=None)


def last_step(run: dict[str, Any]) -> int:
    """The index of the last step of which a run has any result."""
    rows = [run["samples_seen"], *run.get("static", {}).values()]
    rows += [map(_any, periods_matrix(task)) for task in run["tasks"].values()]
    return max((i for i, values in enumerate(zip(*rows, strict=True)) if _any(values) is not None), default=0)


def _any(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def static_value(one: dict[str, Any], key: str) -> float | None:
    """The value of a static task: of a run, that of its last step, whatever earlier ones have."""
    values = one.get("static", {}).get(key)
    return values[last_step(one)] if isinstance(values, list) else values


# Several seeds.


def by_seed(runs: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ in their seed only, together: name -> runs."""
    groups: dict[tuple, list[str]] = {}
    for name, run in runs.items():
        known = run.get("settings") is not None and run.get("seed") is not None
        alike = tuple(str(run.get(one)) for one in ("method", "scale", "filter", "settings", "samples_seen"))
        groups.setdefault(alike if known else (name,), []).append(name)
    named = {}
    for names in groups.values():
        seeds = [runs[name].get("seed") for name in names]
        if len(set(seeds)) < len(seeds):  # one seed twice: these are no repetitions
            named |= {name: [runs[name]] for name in names}
        else:
            named[names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"] = [runs[n] for n in names]
    return named


def spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of several runs' values; None where one is missing, or of one value."""
    values = list(values)
    if not values or None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
