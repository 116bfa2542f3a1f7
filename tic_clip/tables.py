"""What the tables of a report say: matrices, the comparison, published numbers, the evaluation data; and as CSV."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from tic_clip.benchmarks import Benchmark
from tic_clip.coverage import coverage
from tic_clip.markup import MAX_NUMBERED, MISSING, Table, percent, powers, thousands
from tic_clip.metrics import MAIN_METRIC
from tic_clip.paper import FLICKR, IMAGENET, SHIFTS, Reference, read_reference
from tic_clip.summary import Summaries, by_seed, periods_matrix, spread, static_value, total

TRANSFERS = {"backward": "backward", "id": "ID", "forward": "forward"}
Cell = tuple[float | None, float | None]
"""A figure, a share of 1, and its standard deviation over seeds where there are several."""


def tables(found: Summaries, reference: Reference | None = None) -> list[Table]:
    """All tables of a report: ``headline``, and what stands behind the numbers."""
    return [*headline(found, reference), *coverage(found)]


def headline(found: Summaries, reference: Reference | None = None) -> list[Table]:
    """The comparison of runs and models if there are several, else the matrices of the run; what there is beside it."""
    first = matrices(found).get(next(iter(found.runs)), []) if found.single else []
    first = first or ([comparison(found)] if rows(found) else [])
    beside = [_beside(found, reference)] if reference else []
    return [*first, *beside, *_static_table(found), *_models_table(found)]


def matrices(found: Summaries) -> dict[str, list[Table]]:
    """The matrix of each task of each run."""
    return {
        name: [_matrix_table(found.benchmark, run, task) for task in run["tasks"]] for name, run in found.runs.items()
    }


def _matrix_table(benchmark: Benchmark, run: dict, name: str) -> Table:
    task = run["tasks"][name]
    values = periods_matrix(task)
    transfers = ", ".join(f"{TRANSFERS[key]} {percent(task[key])}" for key in ("id", "backward", "forward"))
    return Table(
        title=f"{benchmark.title}, {run['method']}: {name}, {task['metric']} in per cent",
        header=["trained up to", *benchmark.periods],
        rows=[[step, *map(percent, row)] for step, row in zip(run["steps"], values, strict=True)],
        marked={(i, 1 + j) for i, j in own_periods(benchmark)},
        legend=f"{transfers} ({{mark}}: a step's model on the step's own periods)" + _interval_note(task),
        wide=len(benchmark.periods) > MAX_NUMBERED,
    )


def _interval_note(task: dict) -> str:
    """How wide the cells' intervals are."""
    widths = [high - low for row in task.get("ci95", []) for low, high in filter(None, row)]
    return f"; a cell is good to ± {50 * sum(widths) / len(widths):.1f} on average (95 %)" if widths else ""


def own_periods(benchmark: Benchmark) -> list[tuple[int, int]]:
    """(step, period) index pairs of each step's own periods: the diagonal of the matrix."""
    owners = [i for i, step in enumerate(benchmark.steps) for _ in step.periods]
    return [(i, j) for j, i in enumerate(owners)]


# The comparison: a row a run, or a group of runs that differ in their seed only; models that are no run after them.


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the comparison says of a run, of its repetitions, or of a model."""

    name: str
    method: str
    count: int  # of repetitions
    samples: float | None
    macs: float | None
    figures: list[Cell]


def columns(found: Summaries) -> list[tuple[str, Callable[[dict], float | None]]]:
    """(header, how to read it from a summary) of each figure of the comparison, in the order of the paper's table."""
    static = sorted({key for one in found.everything.values() for key in one.get("static", {})})
    shown = [
        ("ImageNet", [IMAGENET], {IMAGENET} & set(static)),
        (f"shifts\n({len(SHIFTS)})", SHIFTS, set(SHIFTS) & set(static)),
        ("Flickr30k", [FLICKR], {FLICKR} & set(static)),
        (f"average\n({len(static)})", static, set(static)),
    ]
    some = [(head, _mean_static(keys)) for head, keys, there in shown if there]
    return some + [
        (f"{task}\n{label}", _transfer(task, key)) for task in found.tasks for key, label in TRANSFERS.items()
    ]


def _mean_static(keys: list[str]) -> Callable[[dict], float | None]:
    return lambda one: spread(static_value(one, key) for key in keys)[0]


def _transfer(task: str, key: str) -> Callable[[dict], float | None]:
    return lambda one: one["tasks"].get(task, {}).get(key)


def rows(found: Summaries) -> list[Row]:
    """The rows of the comparison."""
    readers = [read for _, read in columns(found)]
    return [
        Row(
            name=name,
            method=group[0].get("method") or group[0].get("family") or MISSING,
            count=len(group),
            samples=total(group[0], "samples_seen"),
            macs=total(group[0], "macs_seen"),
            figures=[_over(group, read) for read in readers],
        )
        for name, group in _groups(found).items()
    ]


def _groups(found: Summaries) -> dict[str, list[dict]]:
    """What is one row: runs that differ in their seed only; models with static results, as they have no transfer."""
    return by_seed(found.runs) | {name: [one] for name, one in found.models.items() if one.get("static")}


def _over(group: list[dict], read: Callable[[dict], float | None]) -> Cell:
    return spread(read(one) for one in group)


def comparison(found: Summaries) -> Table:
    """A row a run; the best figure of each column is marked."""
    lines, heads = rows(found), [head for head, _ in columns(found)]
    with_macs = any(line.macs is not None for line in lines)
    names = ["run", "method", "samples\nseen", *["MACs"] * with_macs]
    left = [[line.name, line.method, thousands(line.samples), *[powers(line.macs)] * with_macs] for line in lines]
    cells = [[percent(*figure) for figure in line.figures] for line in lines]
    legend = ["{mark}: the best of its column", *_static_note(heads)] + [
        "MACs are those of the forward passes"
    ] * with_macs
    sizes = sorted({line.count for line in lines} - {1})
    legend += [f"±: standard deviation over n = {' or '.join(map(str, sizes))} runs with different seeds"] * bool(sizes)
    return Table(
        title=f"{found.benchmark.title}: {', '.join([*metric_notes(found), 'in per cent'])}",
        header=[*names, *heads],
        rows=[head + row for head, row in zip(left, cells, strict=True)],
        marked={(i, len(names) + j) for i, j in _best([line.figures for line in lines])},
        legend="; ".join(legend),
        text=2,
    )


def _static_note(heads: list[str]) -> list[str]:
    """What the columns of static tasks are means of."""
    notes = {"shifts": f"shifts: mean of {', '.join(SHIFTS)}", "average": "average: mean of all static tasks"}
    return [note for name, note in notes.items() if any(head.startswith(f"{name}\n") for head in heads)]


def metric_notes(found: Summaries) -> list[str]:
    """Which metric each task's numbers are."""
    return [f"{task} = {MAIN_METRIC[found.benchmark.tasks[task]]}" for task in found.tasks]


def _best(figures: list[list[Cell]]) -> set[tuple[int, int]]:
    """Where the largest figure of each column stands; figures that read the same as it are as good."""
    best = set()
    for j, column in enumerate(zip(*figures, strict=True)):
        shown = [value for value, _ in column if value is not None]
        best |= {(i, j) for i, (value, _) in enumerate(column) if shown and percent(value) == percent(max(shown))}
    return best


def read_published(path: str, found: Summaries) -> Reference:
    """A user's copy of published numbers, for the rows and columns that there are.

    Raises:
        TicError: as ``read_reference``.
    """
    names = dict.fromkeys(name for row in rows(found) for name in (row.method, row.name))
    return read_reference(path, list(names), _heads(found))


def _heads(found: Summaries) -> list[str]:
    return [head.replace("\n", " ") for head, _ in columns(found)]


def _beside(found: Summaries, reference: Reference) -> Table:
    """Published numbers beside ours: ours, published, and the difference in points."""
    lines = []
    for row in rows(found):
        ours = dict(zip(_heads(found), row.figures, strict=True))
        for method in [each for each in reference.values if each in (row.method, row.name)]:
            cells = []
            for column in reference.columns:
                (value, _), published = ours[column], reference.values[method].get(column)
                both = value is not None and published is not None
                cells += [percent(value), MISSING if published is None else f"{published:.1f}"]
                cells.append(f"{100 * value - published:+.1f}".replace("-", "\u2212") if both else MISSING)
            lines.append([row.name, method, *cells])
    parts = ("ours", "published", "difference")
    return Table(
        title=f"Beside the numbers of {reference.name}, in per cent",
        header=["run", "method", *(f"{column}\n{part}" for column in reference.columns for part in parts)],
        rows=lines,
        marked=set(),
        legend="differences are ours - published, in points",
        text=2,
    )


# What else there is.


def _static_table(found: Summaries) -> list[Table]:
    """The static tasks: a row a task; a column a step of the single run, or a run or model."""
    groups = {name: group for name, group in _groups(found).items() if any(one.get("static") for one in group)}
    keys = dict.fromkeys(key for group in groups.values() for one in group for key in one.get("static", {}))
    if not keys:
        return []
    header = list(groups)
    lines = {key: [_over(group, _mean_static([key])) for group in groups.values()] for key in keys}
    if found.single:
        header = found.single["steps"]
        lines = {key: [(value, None) for value in found.single["static"][key]] for key in keys}
    return [
        Table(
            title="Static tasks, main metric in per cent",
            header=["task", *header],
            rows=[[key, *(percent(*cell) for cell in line)] for key, line in lines.items()],
            marked=set(),
            legend="of each step's model" if found.single else "of a run, the model of its last step",
            wide=len(header) > MAX_NUMBERED,
        )
    ]


def _models_table(found: Summaries) -> list[Table]:
    """Models that are no run of ours, on old and new data."""
    if not any(model["tasks"] for model in found.models.values()):
        return []
    old, new = old_periods(found.benchmark), new_periods(found.benchmark)
    spans = {span(old): old, span(new): new, "all": found.benchmark.periods}
    return [
        Table(
            title=f"{found.benchmark.title}: models by the time of the data, in per cent",
            header=["model", "family", *(f"{task}\n{span}" for task in found.tasks for span in spans)],
            rows=[
                [name, one["family"] or MISSING]
                + [percent(mean_over(one, task, periods)) for task in found.tasks for periods in spans.values()]
                for name, one in found.models.items()
            ],
            marked=set(),
            legend=f"means over the periods named; {', '.join(metric_notes(found))}",
            text=2,
        )
    ]


def span(periods: tuple[str, ...]) -> str:
    """Periods in words."""
    return periods[0] if len(periods) == 1 else f"{periods[0]} to {periods[-1]}"


def old_periods(benchmark: Benchmark) -> tuple[str, ...]:
    """The periods of the first step: 2014 to 2016 of TiC-DataComp."""
    return benchmark.steps[0].periods


def new_periods(benchmark: Benchmark) -> tuple[str, ...]:
    """The last two periods: 2021 and 2022 of TiC-DataComp."""
    return benchmark.periods[-2:]


def mean_over(model: dict, task: str, periods: tuple[str, ...]) -> float | None:
    """The mean of a model's values on some periods; None if one is missing."""
    values = model["tasks"].get(task, {}).get("periods", {})
    return spread(values.get(period) for period in periods)[0]


def matrix_csv(found: Summaries) -> str:
    """Every cell of every task in full precision; empty where there is no result."""
    several = not found.single
    rows = [["run"] * several + ["task", "step", *found.benchmark.periods]]
    for name, run in found.runs.items():
        for task, summary in run["tasks"].items():
            for step, row in zip(run["steps"], periods_matrix(summary), strict=True):
                rows.append([name] * several + [task, step, *map(_full, row)])
    for name, model in found.models.items():
        rows += [[name, task, "", *map(_full, each["periods"].values())] for task, each in model["tasks"].items()]
    return _csv(rows)


def comparison_csv(found: Summaries) -> str:
    """The comparison in full precision, as shares of 1; the standard deviation over seeds in columns of its own."""
    lines = [
        [
            "run",
            "method",
            "runs",
            "samples seen",
            "MACs",
            *(name for head in _heads(found) for name in (head, f"{head} sd")),
        ]
    ]
    for row in rows(found):
        figures = [_full(value) for figure in row.figures for value in figure]
        lines.append([row.name, row.method, str(row.count), _full(row.samples), _full(row.macs), *figures])
    return _csv(lines)


def _full(value: float | None) -> str:
    return "" if value is None else repr(value)


def _csv(lines: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
