"""The tables of a report: matrices, the comparison, published numbers, static tasks, models, evaluation data."""

from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.report.frame import DATA, SPENT, Results, Subject

IMAGENET, FLICKR = "imagenet1k", "retrieval/flickr_1k_test_image_text_retrieval"
SHIFTS = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"]
"""ImageNet's distribution shifts, as DataComp's list of tasks calls them; the paper averages them."""
TRANSFERS = {"backward": "backward", "id": "ID", "forward": "forward"}
ABOUT = ["method", "runs", "samples seen", "MACs", "results"]
MISSING = "–"
MARK = "*"
MAX_NUMBERED = 15
"""With more columns than this, a matrix is drawn without numbers and left out of the terminal."""


class Table(NamedTuple):
    """A table of text. Cells that end in ``MARK`` stand out; ``legend`` says why, in files as "bold"."""

    title: str
    cells: pd.DataFrame
    legend: str = ""
    text: int = 1  # so many columns at the left are words


def percent(value: float, deviation: float = float("nan")) -> str:
    """Return a share in per cent with one decimal."""
    return number(100 * value, ".1f") + ("" if pd.isna(deviation) else f" ± {100 * deviation:.1f}")


def number(count: float | None, form: str = ",") -> str:
    """Return a count with separators, or as ``form`` says."""
    return MISSING if pd.isna(count) else format(count, form).replace("e+", "e")


def to_text(table: Table) -> str:
    """Return a table as aligned text for a terminal."""
    if table.cells.shape[1] > MAX_NUMBERED + 1:
        return f"{table.title}\n({table.cells.shape[1]} columns: see table.md)\n{table.legend}"
    heads = zip_longest(*(head.split("\n") for head in table.cells), fillvalue="")
    columns = []
    for j, column in enumerate(zip(*heads, *table.cells.to_numpy(), strict=True)):
        padded = [cell if cell.endswith(MARK) else f"{cell} " for cell in column]
        width = max(map(len, padded))
        columns.append([cell.ljust(width) if j < table.text else cell.rjust(width) for cell in padded])
    aligned = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, "", *aligned, "", table.legend])


def headline_tables(results: Results, compared: pd.DataFrame, reference: str | None = None) -> list[Table]:
    """Return the matrices of a single run, else the comparison of runs and models; then what stands beside it."""
    tables = matrix_tables(results.single) if results.single else []
    tables += [comparison_table(results, compared)] if len(compared) and not tables else []
    tables += [reference_table(results, compared, reference)] if reference else []
    tables += [static_table(results, compared)] if results.static_keys else []
    return tables + ([models_table(results)] if any(one.tasks for one in results.models) else [])


def metric_notes(results: Results) -> list[str]:
    """Return which metric each task's numbers are."""
    return [f"{task} = {results.benchmark.main_metric(task)}" for task in results.tasks]


def matrix_tables(run: Subject) -> list[Table]:
    """Return the matrix of each task of a run, its own periods marked."""
    benchmark, tables = run.benchmark, []
    for task in run.tasks:
        values, transfers = run.matrix(task), run.transfer(task)
        legend = ", ".join(f"{TRANSFERS[key]} {percent(transfers[key])}" for key in ("id", "backward", "forward"))
        legend += f" ({MARK}: a step's model on the step's own periods)"
        width = (run.matrix(task, "high") - run.matrix(task, "low")).stack().mean()
        legend += "" if pd.isna(width) else f"; a cell is good to ± {50 * width:.1f} on average (95 %)"
        found = int(values.notna().sum(axis=None))
        legend += f"; results {found:,} of {values.size:,}" if found < values.size else ""
        title = f"{benchmark.title}, {run.about['method']}: {task}, {benchmark.main_metric(task)} in per cent"
        cells = values.map(percent)
        for step in benchmark.steps:
            cells.loc[step.name, list(step.periods)] += MARK
        tables.append(Table(title, cells.reset_index(names="trained up to"), legend))
    return tables


def matrix_csv(results: Results) -> str:
    """Return every cell of every task in full precision; empty where there is no result."""
    parts = {(one.name, task): one.matrix(task) for one in results.subjects for task in one.tasks}
    parts = parts or {("", ""): pd.DataFrame(columns=results.benchmark.periods)}
    table = pd.concat(parts, names=["run", "task", "step"])
    return (table.droplevel("run") if results.single else table).to_csv(lineterminator="\n")


def compare(results: Results) -> pd.DataFrame:
    """Return a row for each group of runs that differ in their seed only, and for each model with static results.

    Columns: ``ABOUT``, and for each figure and static task its mean, a share of 1, and its standard deviation, "… sd".
    """
    figures = pd.DataFrame({one.name: _read_figures(results, one) for one in results.subjects}, dtype=float)
    groups, about = _group_seeds(results), {}
    for label, group in groups.items():
        spent = [group[0].spent[column].dropna().max() for column in SPENT]
        method = group[0].about["method"] or group[0].about["family"] or MISSING
        about[label] = [method, len(group), *spent, _count_results(results, group)]
    compared = pd.DataFrame.from_dict(about, orient="index", columns=ABOUT, dtype=object)
    for head in figures.index:
        values = [figures.loc[head, [one.name for one in group]] for group in groups.values()]
        compared[head] = [part.mean(skipna=False) for part in values]
        compared[f"{head} sd"] = [part.std(skipna=False) for part in values]
    return compared


def _read_figures(results: Results, one: Subject) -> dict[str, float]:
    """Return the figures of a run or model by their heads, and its static tasks."""
    static, keys = one.static.loc[one.last_step], results.static_keys
    groups = {"ImageNet": [IMAGENET], f"shifts ({len(SHIFTS)})": SHIFTS, "Flickr30k": [FLICKR]}
    groups[f"average ({len(keys)})"] = sorted(keys)
    figures = {head: static.reindex(part).to_numpy().mean() for head, part in groups.items() if set(part) & set(keys)}
    for task in results.tasks:
        transfers = one.transfer(task)
        figures |= {f"{task} {label}": transfers[key] for key, label in TRANSFERS.items()}
    return figures | static.reindex(keys).to_dict()


def _group_seeds(results: Results) -> dict[str, list[Subject]]:
    """Return the runs or models of each row: runs that differ in their seed only; a model that has static results."""
    alike: dict[tuple, list[Subject]] = {}
    for run in results.runs:
        settings = run.about[["method", "scale", "filter", "settings"]].map(str)
        is_known = run.about[["settings", "seed"]].notna().all()
        alike.setdefault((*settings, *map(str, run.spent["samples_seen"])) if is_known else (run.name,), []).append(run)
    groups = {}
    for runs in alike.values():
        if len({run.about["seed"] for run in runs}) < len(runs):  # one seed twice: not repetitions
            groups |= {run.name: [run] for run in runs}
        else:
            groups[runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more"] = runs
    return groups | {one.name: [one] for one in results.models if len(one.static.columns)}


def _count_results(results: Results, group: list[Subject]) -> str:
    """Return "15 of 49" results, or "all"."""
    parts = [one.matrix(task) for one in group for task in results.tasks]
    parts += [one.static.loc[one.last_step].reindex(results.static_keys) for one in group if len(one.static.columns)]
    found, total = sum(int(part.notna().sum(axis=None)) for part in parts), sum(part.size for part in parts)
    return f"{found:,} of {total:,}" if found < total else "all"


def _figure_heads(results: Results, compared: pd.DataFrame) -> list[str]:
    """Return the heads of the figures in the order of the paper's table, without static tasks."""
    return [head for head in compared if f"{head} sd" in compared and head not in results.static_keys]


def comparison_csv(results: Results, compared: pd.DataFrame) -> str:
    """Return the comparison in full precision, as shares of 1."""
    heads = [column for head in _figure_heads(results, compared) for column in (head, f"{head} sd")]
    return compared[[*ABOUT[:-1], *heads]].to_csv(index_label="run", lineterminator="\n")


def _write_figures(compared: pd.DataFrame, head: str) -> list[str]:
    return list(map(percent, compared[head], compared[f"{head} sd"]))


def comparison_table(results: Results, compared: pd.DataFrame) -> Table:
    """Return the comparison in per cent; the best figure of each column is marked."""
    heads, notes = _figure_heads(results, compared), [f"{MARK}: the best of its column"]
    cells = compared[["method"]].assign(**{"samples\nseen": compared["samples seen"].map(number)})
    if any(head.startswith("shifts (") for head in heads):
        notes.append(f"shifts: mean of {', '.join(SHIFTS)}")
    if results.static_keys:
        notes.append("average: mean of all static tasks")
    if compared["MACs"].notna().any():
        cells["MACs"] = [number(count, ".1e") for count in compared["MACs"]]
        notes.append("MACs are those of the forward passes")
    if sizes := sorted(set(compared["runs"]) - {1}):
        notes.append(f"±: standard deviation over n = {' or '.join(map(str, sizes))} runs with different seeds")
    if (compared["results"] != "all").any():
        cells["results"] = compared["results"]
    for head in heads:
        best = (compared[head].map(percent) == percent(compared[head].max())) & compared[head].notna()
        cells["\n".join(head.rsplit(" ", 1))] = _write_figures(compared, head) + best.map({True: MARK, False: ""})
    title = f"{results.benchmark.title}: {', '.join([*metric_notes(results), 'in per cent'])}"
    return Table(title, cells.reset_index(names="run"), "; ".join(notes), text=2)


def reference_table(results: Results, compared: pd.DataFrame, path: str) -> Table:
    """Return ours, published, and the difference in points, of what the CSV ``path`` has; in per cent."""
    try:
        published = pd.read_csv(path, index_col="method", skipinitialspace=True, encoding="utf-8-sig").astype(float)
    except ValueError as error:  # not CSV, no column "method", a text
        raise TicError(f"{path} is not a table of method and numbers in per cent: {error}") from None
    methods, heads = [*compared["method"], *compared.index], _figure_heads(results, compared)
    for kind, used, valid in (("method", published.index, methods), ("column", published.columns, heads)):
        if len(wrong := used.difference(valid)):
            raise TicError(f"{path}: unknown {kind} {wrong[0]!r}; there are: {', '.join(dict.fromkeys(valid))}")
    rows = []
    for run, method in compared["method"].items():
        for (label, head), theirs in published.stack().items():
            if label in (run, method):
                ours = 100 * compared.loc[run, head]
                numbers = number(ours, ".1f"), number(theirs, ".1f"), number(ours - theirs, "+.1f")
                rows.append([run, label, head, *numbers])
    cells = pd.DataFrame(rows, columns=["run", "method", "figure", "ours", "published", "difference"])
    title = f"Beside the numbers of {Path(path).name}, in per cent"
    return Table(title, cells, "differences are ours - published, in points", text=3)


def static_table(results: Results, compared: pd.DataFrame) -> Table:
    """Return the static tasks: a row a task; a column a step of the single run, or a run or model."""
    if results.single:
        cells, legend = results.single.static.map(percent).T, "of each step's model"
    else:
        some = compared.dropna(subset=results.static_keys, how="all")
        cells = pd.DataFrame({key: _write_figures(some, key) for key in results.static_keys}, index=some.index).T
        legend = "of a run, the model of its last step"
    cells = cells.reset_index(names="task", allow_duplicates=True)
    return Table("Static tasks, main metric in per cent", cells, legend)


def models_table(results: Results) -> Table:
    """Return models that are not runs of ours, on old and new data."""
    spans = old_and_new(results.benchmark) | {"all": results.benchmark.periods}
    cells = {"model": [one.name for one in results.models]}
    cells["family"] = [one.about["family"] or MISSING for one in results.models]
    counts = [_count_results(results, [one]) for one in results.models]
    cells |= {"results": counts} if set(counts) != {"all"} else {}
    for task in results.tasks:
        means = [map(percent, one.mean_over(task, spans.values())[0]) for one in results.models]
        cells |= {f"{task}\n{label}": column for label, column in zip(spans, zip(*means, strict=True), strict=True)}
    title = f"{results.benchmark.title}: models by the time of the data, in per cent"
    legend = f"means over the periods named; {', '.join(metric_notes(results))}"
    return Table(title, pd.DataFrame(cells), legend, text=2)


def old_and_new(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Return the periods of the first step, and the last two: 2014 to 2016, 2021 and 2022 of TiC-DataComp."""
    spans = (benchmark.steps[0].periods, benchmark.periods[-2:])
    return {span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}": span for span in spans}


def data_tables(summaries: dict[str, dict]) -> list[Table]:
    """Return how many samples were scored, and what was left out; nothing if no result tells."""
    rows = []
    for name, one in summaries.items():
        for task, data in one.get("data", {}).items():
            facts, reasons = pd.DataFrame.from_dict(data, orient="index").reindex(columns=DATA), Counter()
            for period in data.values():
                reasons.update(period.get("dropped", {}) | {"features not finite": period.get("nonfinite", 0)})
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "0"
            samples, coverage = facts["num_samples"].sum(min_count=1), facts["coverage"].min()
            rows.append([name, task, number(samples, ",.0f"), number(coverage, ".2%"), left_out])
    columns = ["run", "task", "samples", "coverage", "left out"]
    cells = pd.DataFrame(rows, columns=columns).groupby(columns[1:], sort=False)["run"].agg(", ".join)
    legend = "samples: over all periods; coverage: the least share of a period's list of UIDs that is there"
    table = Table("Evaluation data", cells.reset_index()[columns], legend, text=2)
    return [table] if rows else []


def about_table(results: Results, summaries: dict[str, dict]) -> Table:
    """Return what was run, and with which versions."""
    fields = ["method", "family", "scale", "filter", "seed"]
    cells = pd.DataFrame([one.about[fields].fillna(MISSING) for one in results.subjects]).astype(str)
    seen = [one.spent["samples_seen"].dropna() for one in results.subjects]
    cells.insert(0, "run", list(summaries))
    cells["samples seen"] = [number(count.max()) for count in seen]
    cells["steps"] = [f"{len(count)} of {len(one.steps)}" for count, one in zip(seen, results.subjects, strict=True)]
    cells["versions"] = [
        ", ".join(f"{name} {version}" for name, version in one["pins"].items()) for one in summaries.values()
    ]
    return Table("What was run", cells, text=6)
