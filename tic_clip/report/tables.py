"""The tables of a report: matrices, the comparison, published numbers, static tasks, models, evaluation data."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.metrics import MAIN_METRIC
from tic_clip.report.frame import SPENT, STATIC, Results, Subject

IMAGENET, FLICKR = "imagenet1k", "retrieval/flickr_1k_test_image_text_retrieval"
SHIFTS = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"]
"""ImageNet's distribution shifts, as DataComp's list of tasks calls them; the paper averages them."""
TRANSFERS = {"backward": "backward", "id": "ID", "forward": "forward"}
MISSING = "–"
MAX_NUMBERED = 15
"""With more columns than this, a matrix is drawn without numbers and left out of the terminal."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text. ``marked`` (bool, of the right-most columns) stands out, ``legend`` explains it."""

    title: str
    cells: pd.DataFrame
    legend: str
    marked: np.ndarray | None = None
    text: int = 1  # so many columns at the left are words

    @property
    def wide(self) -> bool:
        """Return whether it is a matrix that is too wide for a terminal."""
        return self.text == 1 and self.cells.shape[1] > MAX_NUMBERED + 1

    @property
    def rows(self) -> list[list[tuple[str, bool]]]:
        """Return the (text, whether it is marked) of each cell of each row."""
        marked = np.zeros(self.cells.shape, dtype=bool)
        if self.marked is not None and self.marked.size:
            marked[:, -self.marked.shape[1] :] = self.marked
        return [list(zip(*row, strict=True)) for row in zip(self.cells.to_numpy(), marked.tolist(), strict=True)]


def percent(value: float, deviation: float = np.nan) -> str:
    """Return a share in per cent with one decimal."""
    around = "" if np.isnan(deviation) else f" ± {100 * deviation:.1f}"
    return MISSING if np.isnan(value) else f"{100 * value:.1f}{around}"


def number(count: float | None, form: str = ",") -> str:
    """Return a count with separators, or as ``form`` says."""
    return MISSING if pd.isna(count) else format(count, form).replace("e+", "e")


def to_text(table: Table) -> str:
    """Return a table as aligned text for a terminal."""
    legend = table.legend.replace("{mark}", "*")
    if table.wide:
        return f"{table.title}\n(the matrix has {table.cells.shape[1] - 1} columns: see matrix.csv)\n{legend}"
    heads = [head.split("\n") for head in table.cells]
    lines = [[f"{head[k] if k < len(head) else ''} " for head in heads] for k in range(max(map(len, heads)))]
    lines += [[f"{cell}{'*' if mark else ' '}" for cell, mark in row] for row in table.rows]
    columns = [
        [cell.ljust(width) if j < table.text else cell.rjust(width) for cell in column]
        for j, column in enumerate(zip(*lines, strict=True))
        for width in [max(map(len, column))]
    ]
    aligned = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, "", *aligned, "", legend])


def headline_tables(results: Results, compared: "Comparison", reference: str | None = None) -> list[Table]:
    """Return the matrices of a single run, else the comparison of runs and models; then what stands beside it."""
    tables = matrix_tables(results.single) if results.single else []
    if not tables and len(compared.about):
        tables = [comparison_table(results, compared)]
    if reference:
        tables.append(reference_table(compared, reference))
    if results.static_keys:
        tables.append(static_table(results, compared))
    return [*tables, models_table(results)] if any(one.tasks for one in results.models) else tables


def metric_notes(results: Results) -> list[str]:
    """Return which metric each task's numbers are."""
    return [f"{task} = {MAIN_METRIC[results.benchmark.tasks[task]]}" for task in results.tasks]


def matrix_tables(run: Subject) -> list[Table]:
    """Return the matrix of each task of a run, its own periods marked."""
    benchmark, tables = run.benchmark, []
    for task in run.tasks:
        values, transfers = run.matrix(task), run.transfer(task)
        legend = ", ".join(f"{TRANSFERS[key]} {percent(transfers[key])}" for key in ("id", "backward", "forward"))
        legend += " ({mark}: a step's model on the step's own periods)"
        width = (run.matrix(task, "high") - run.matrix(task, "low")).stack().mean()
        legend += f"; a cell is good to ± {50 * width:.1f} on average (95 %)" if np.isfinite(width) else ""
        found = int(values.notna().sum(axis=None))
        legend += f"; results {found:,} of {values.size:,}" if found < values.size else ""
        title = f"{benchmark.title}, {run.about['method']}: {task}, {MAIN_METRIC[benchmark.tasks[task]]} in per cent"
        marked = np.array([[period in step.periods for period in benchmark.periods] for step in benchmark.steps])
        cells = values.map(percent).reset_index(names="trained up to")
        tables.append(Table(title=title, cells=cells, marked=marked, legend=legend))
    return tables


def matrix_csv(results: Results) -> str:
    """Return every cell of every task in full precision; empty where there is no result."""
    parts = {(one.name, task): one.matrix(task) for one in results.subjects for task in one.tasks}
    parts = parts or {("", ""): pd.DataFrame(columns=results.benchmark.periods)}
    table = pd.concat(parts, names=["run", "task", "step"])
    return (table.droplevel("run") if results.single else table).to_csv(lineterminator="\n")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs, or groups of runs that differ in their seed only; then models that have static results."""

    about: pd.DataFrame  # a row each
    means: pd.DataFrame  # a column each: figures and static tasks, shares of 1
    spreads: pd.DataFrame  # standard deviations over seeds
    texts: pd.DataFrame  # both, in per cent
    heads: list[str]  # of the figures, in the order of the paper's table


def compare(results: Results) -> Comparison:
    """Return the comparison of all runs, and of models with static results."""
    figures = pd.DataFrame({one.name: _read_figures(results, one) for one in results.subjects}, dtype=float)
    about, means, spreads, texts = {}, {}, {}, {}
    for label, group in _group_seeds(results).items():
        spent = [group[0].spent[column].dropna().max() for column in SPENT]
        method = group[0].about["method"] or group[0].about["family"] or MISSING
        about[label] = [method, len(group), *spent, _count_results(results, group)]
        values = figures[[one.name for one in group]].to_numpy()
        means[label] = [row.mean() for row in values]
        spreads[label] = [row.std(ddof=1) if len(row) > 1 else np.nan for row in values]
        texts[label] = list(map(percent, means[label], spreads[label]))
    columns = ["method", "runs", "samples seen", "MACs", "results"]
    return Comparison(
        about=pd.DataFrame.from_dict(about, orient="index", columns=columns, dtype=object),
        means=pd.DataFrame(means, index=figures.index, dtype=float),
        spreads=pd.DataFrame(spreads, index=figures.index, dtype=float),
        texts=pd.DataFrame(texts, index=figures.index, dtype=object),
        heads=[head for head in figures.index if head not in results.static_keys],
    )


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
        settings = [str(run.about[field]) for field in ("method", "scale", "filter", "settings")]
        is_known = run.about["settings"] is not None and run.about["seed"] is not None
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


def comparison_csv(compared: Comparison) -> str:
    """Return the comparison in full precision, as shares of 1."""
    table = compared.about.drop(columns="results")
    for head in compared.heads:
        table[head], table[f"{head} sd"] = compared.means.loc[head], compared.spreads.loc[head]
    return table.to_csv(index_label="run", lineterminator="\n")


def comparison_table(results: Results, compared: Comparison) -> Table:
    """Return the comparison in per cent; the best figure of each column is marked."""
    about, texts = compared.about, compared.means.loc[compared.heads].T.map(percent)
    best = texts.eq(compared.means.loc[compared.heads].max(axis=1).map(percent)) & texts.ne(MISSING)
    cells = {"run": about.index, "method": about["method"], "samples\nseen": about["samples seen"].map(number)}
    notes = ["{mark}: the best of its column"]
    if any(head.startswith("shifts (") for head in compared.heads):
        notes.append(f"shifts: mean of {', '.join(SHIFTS)}")
    if results.static_keys:
        notes.append("average: mean of all static tasks")
    if about["MACs"].notna().any():
        cells["MACs"] = [number(count, ".1e") for count in about["MACs"]]
        notes.append("MACs are those of the forward passes")
    if sizes := sorted(set(about["runs"]) - {1}):
        notes.append(f"±: standard deviation over n = {' or '.join(map(str, sizes))} runs with different seeds")
    if (about["results"] != "all").any():
        cells["results"] = about["results"]
    cells |= {"\n".join(head.rsplit(" ", 1)): compared.texts.loc[head] for head in compared.heads}
    title = f"{results.benchmark.title}: {', '.join([*metric_notes(results), 'in per cent'])}"
    cells = pd.DataFrame({head: list(column) for head, column in cells.items()})
    return Table(title=title, cells=cells, marked=best.to_numpy(), legend="; ".join(notes), text=2)


def reference_table(compared: Comparison, path: str) -> Table:
    """Return ours, published, and the difference in points, of what the CSV ``path`` has; in per cent."""
    ours, methods = 100 * compared.means.loc[compared.heads].T, compared.about["method"]
    try:
        published = pd.read_csv(path, index_col="method", skipinitialspace=True, encoding="utf-8-sig")
        published = published.rename(columns=str.strip, index=str.strip).astype(float)
    except (ValueError, KeyError) as error:  # not CSV, no column "method", a cell too many or a text
        raise TicError(f"{path} is not a table of method and numbers in per cent: {error}") from None
    valid_methods = dict.fromkeys([*methods, *ours.index])
    for kind, used, valid in (("column", published.columns, ours.columns), ("method", published.index, valid_methods)):
        if wrong := [*used.difference(valid, sort=False), *used[used.duplicated()]]:
            raise TicError(f"{path}: unknown or repeated {kind} {wrong[0]!r}; there are: {', '.join(valid)}")
    if ((published < 0) | (published > 100)).any(axis=None):
        raise TicError(f"{path}: a number is not in per cent, from 0 to 100")
    rows = [(name, row) for name in ours.index for row in published.index if row in (name, methods[name])]
    cells = {"run": [name for name, _ in rows], "method": [row for _, row in rows]}
    for head in published:
        pairs = [(ours.loc[name, head], published.loc[row, head]) for name, row in rows]
        cells[f"{head}\nours"] = [number(value, ".1f") for value, _ in pairs]
        cells[f"{head}\npublished"] = [number(value, ".1f") for _, value in pairs]
        cells[f"{head}\ndifference"] = [number(a - b, "+.1f").replace("-", "\u2212") for a, b in pairs]
    title = f"Beside the numbers of {Path(path).name}, in per cent"
    return Table(title=title, cells=pd.DataFrame(cells), legend="differences are ours - published, in points", text=2)


def static_table(results: Results, compared: Comparison) -> Table:
    """Return the static tasks: a row a task; a column a step of the single run, or a run or model."""
    if results.single:
        cells, legend = results.single.static.map(percent).T, "of each step's model"
    else:
        names = compared.means.loc[results.static_keys].dropna(axis="columns", how="all").columns
        cells, legend = compared.texts.loc[results.static_keys, names], "of a run, the model of its last step"
    cells = cells.reset_index(names="task", allow_duplicates=True)
    return Table(title="Static tasks, main metric in per cent", cells=cells, legend=legend)


def models_table(results: Results) -> Table:
    """Return models that are not runs of ours, on old and new data."""
    spans = old_and_new(results.benchmark) | {"all": results.benchmark.periods}
    counts = [_count_results(results, [one]) for one in results.models]
    cells = {"model": [one.name for one in results.models]}
    cells["family"] = [one.about["family"] or MISSING for one in results.models]
    cells |= {"results": counts} if set(counts) != {"all"} else {}
    for task in results.tasks:
        for label, periods in spans.items():
            cells[f"{task}\n{label}"] = [percent(mean_over(one, task, periods)[0]) for one in results.models]
    title = f"{results.benchmark.title}: models by the time of the data, in per cent"
    legend = f"means over the periods named; {', '.join(metric_notes(results))}"
    return Table(title=title, cells=pd.DataFrame(cells), legend=legend, text=2)


def old_and_new(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Return the periods of the first step, and the last two: 2014 to 2016, 2021 and 2022 of TiC-DataComp."""
    spans = (benchmark.steps[0].periods, benchmark.periods[-2:])
    return {span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}": span for span in spans}


def mean_over(one: Subject, task: str, periods: tuple[str, ...]) -> np.ndarray:
    """Return the mean over some periods at each step of a run, or of a model; NaN if one is missing."""
    return one.matrix(task)[list(periods)].to_numpy().mean(axis=1)


def data_tables(results: Results, summaries: dict[str, dict]) -> list[Table]:
    """Return the samples that were scored of each period, and what was left out; nothing if no result tells."""
    periods = results.benchmark.periods
    groups: dict[tuple[str, ...], list[str]] = {}  # (task, amounts, what was left out) -> names
    for task in (*results.tasks, STATIC):
        for name, one in summaries.items():
            if facts := one.get("data", {}).get(task):
                amounts = [_write_amount(facts.get(period, {})) for period in periods]
                groups.setdefault((task, *amounts, _count_left_out(facts, task)), []).append(name)
    if not groups:
        return []
    tasks = [task for task, *_ in groups]
    few = [", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) for names in groups.values()]
    labels = [task if tasks.count(task) == 1 else f"{task}: {names}" for task, names in zip(tasks, few, strict=True)]
    cells = pd.DataFrame(list(groups), columns=["task", *periods, "left out"]).assign(task=labels)
    legend = "not all were scored on the same samples" if len({row[:-1] for row in groups}) > len(set(tasks)) else ""
    if (cells["left out"] == "0").all():
        cells, legend = cells.drop(columns="left out"), legend or "no sample was left out"
    title = "Evaluation data: samples that were scored"
    if any("%" in text for row in groups for text in row[1:-1]):
        title += ", and the share of the list of UIDs that is there"
    return [Table(title=title, cells=cells, legend=legend)]


def _write_amount(facts: dict) -> str:
    """Return the samples, and the share in per cent, rounded down, if it is not all."""
    share = facts.get("coverage", 1)
    return number(facts.get("num_samples")) + (f" ({int(1000 * share + 1e-6) / 10:g} %)" if share < 1 else "")


def _count_left_out(data: dict[str, dict], task: str) -> str:
    """Return how many samples were left out, by reason, and how many features are not finite, over all periods."""
    reasons = Counter()
    for period, facts in data.items():
        of = f" of {period}" if task == STATIC else ""
        counts = {**facts.get("dropped", {}), "features not finite": facts.get("nonfinite", 0)}
        reasons.update({f"{reason}{of}": count for reason, count in counts.items() if count})
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "0"
