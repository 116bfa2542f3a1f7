"""The tables of a report, made from the tidy DataFrame: matrices, comparison, published numbers, evaluation data."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.metrics import MAIN_METRIC
from tic_clip.report.frame import STATIC, Results, data_facts

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
    wide: bool = False
    text: int = 1  # so many columns at the left are words

    @property
    def heads(self) -> list[str]:
        """Return the head of each column."""
        return list(self.cells)

    @property
    def rows(self) -> Iterator[list[tuple[str, bool]]]:
        """Yield the (text, whether it is marked) of each cell of each row."""
        marked = np.zeros(self.cells.shape, dtype=bool)
        if self.marked is not None and self.marked.size:
            marked[:, -self.marked.shape[1] :] = self.marked
        for texts, marks in zip(self.cells.to_numpy(), marked.tolist(), strict=True):
            yield list(zip(texts, marks, strict=True))


def percent(value: float, deviation: float = np.nan) -> str:
    """Return a share in per cent with one decimal."""
    around = "" if np.isnan(deviation) else f" ± {100 * deviation:.1f}"
    return MISSING if np.isnan(value) else f"{100 * value:.1f}{around}"


def thousands(count: int | None) -> str:
    """Return a count with separators."""
    return MISSING if pd.isna(count) else f"{count:,}"


def powers(count: float | None) -> str:
    """Return a large count with two digits."""
    return MISSING if pd.isna(count) else f"{count:.1e}".replace("e+", "e")


def to_text(table: Table) -> str:
    """Return a table as aligned text for a terminal."""
    legend = table.legend.replace("{mark}", "*")
    if table.wide:
        return f"{table.title}\n(the matrix has {table.cells.shape[1] - 1} columns: see matrix.csv)\n{legend}"
    heads = [head.split("\n") for head in table.cells]
    lines = [[f"{head[k] if k < len(head) else ''} " for head in heads] for k in range(max(map(len, heads)))]
    lines += [[f"{cell}{'*' if mark else ' '}" for cell, mark in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust if j < table.text else str.rjust for j in range(len(widths))]
    aligned = [" ".join(map(lambda pad, cell, width: pad(cell, width), pads, line, widths)).rstrip() for line in lines]
    return "\n".join([table.title, "", *aligned, "", legend])


def headline_tables(results: Results, reference: str | None = None) -> list[Table]:
    """Return the matrices of a single run, else the comparison of runs and models; then what stands beside it.

    ``reference``: a CSV of published numbers, in per cent; its columns are ``method`` and some of the comparison's.
    """
    compared = compare(results)
    first = matrix_tables(results, results.single) if results.single else []
    first = first or ([comparison_table(results, compared)] if len(compared) else [])
    beside = [reference_table(compared, reference)] if reference else []
    return [*first, *beside, *static_tables(results), *model_tables(results)]


def matrix_tables(results: Results, name: str) -> list[Table]:
    """Return the matrix of each task of a run, its own periods marked."""
    return [_matrix_table(results, name, task) for task in results.tasks_of([name])]


def _matrix_table(results: Results, name: str, task: str) -> Table:
    benchmark, values, transfers = results.benchmark, results.matrix(name, task), results.transfer(name, task)
    notes = [", ".join(f"{TRANSFERS[key]} {percent(transfers[key])}" for key in ("id", "backward", "forward"))]
    notes[0] += " ({mark}: a step's model on the step's own periods)"
    width = (results.matrix(name, task, "high") - results.matrix(name, task, "low")).stack().mean()
    notes += [f"a cell is good to ± {50 * width:.1f} on average (95 %)"] if np.isfinite(width) else []
    found = int(values.notna().sum(axis=None))
    notes += [f"results {found} of {values.size}"] if found < values.size else []
    return Table(
        title=f"{benchmark.title}, {results.about(name)['method']}: {task}, "
        f"{MAIN_METRIC[benchmark.tasks[task]]} in per cent",
        cells=values.map(percent).reset_index(names="trained up to"),
        marked=own_periods(benchmark),
        legend="; ".join(notes),
        wide=len(benchmark.periods) > MAX_NUMBERED,
    )


def own_periods(benchmark: Benchmark) -> np.ndarray:
    """Return the (steps, periods) bool array of each step's own periods: the diagonal of the matrix."""
    return np.array([[period in step.periods for period in benchmark.periods] for step in benchmark.steps])


def matrix_csv(results: Results) -> str:
    """Return every cell of every task in full precision; empty where there is no result."""
    parts = {(name, task): results.matrix(name, task) for name in results.names for task in results.tasks_of([name])}
    if not parts:
        return ",".join(["run"] * (not results.single) + ["task", "step", *results.benchmark.periods]) + "\n"
    table = pd.concat(parts, names=["run", "task", "step"])
    return (table.droplevel("run") if results.single else table).to_csv(lineterminator="\n")


# The comparison: a row a run, or a group of runs that differ in their seed only; models that are not runs after them.


def compare(results: Results) -> pd.DataFrame:
    """Return the comparison as shares of 1, with the standard deviation over seeds as ``{head} sd``."""
    readers = _columns(results)
    columns = [
        "method",
        "runs",
        "samples seen",
        "MACs",
        "results",
        *(f"{head}{sd}" for head in readers for sd in ("", " sd")),
    ]
    rows = {}
    for name, group in _groups(results).items():
        values = np.array([[read(one) for read in readers.values()] for one in group]).reshape(len(group), -1)
        spread = values.std(axis=0, ddof=1) if len(group) > 1 else np.full(len(readers), np.nan)
        means = [float(np.mean(column)) for column in values.T]
        about = results.about(group[0])
        spent = [results.spent(group[0], column).dropna().max() for column in ("samples_seen", "macs_seen")]
        figures = [figure for pair in zip(means, spread.tolist(), strict=True) for figure in pair]
        rows[name] = [
            about["method"] or about["family"] or MISSING,
            len(group),
            *spent,
            _count(results, group),
            *figures,
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=object)


def _columns(results: Results) -> dict[str, Callable[[str], float]]:
    """Return how to read each figure of the comparison for a run or model, by its head, in the order of the paper."""
    keys = sorted(results.static_keys(results.names))
    groups = {"ImageNet": [IMAGENET], f"shifts ({len(SHIFTS)})": SHIFTS, "Flickr30k": [FLICKR]}
    groups = {head: part for head, part in groups.items() if set(part) & set(keys)}
    groups |= {f"average ({len(keys)})": keys} if keys else {}
    readers = {head: partial(_mean_static, results, part) for head, part in groups.items()}
    for task in results.tasks:
        for key, label in TRANSFERS.items():
            readers[f"{task} {label}"] = lambda name, task=task, key=key: results.transfer(name, task)[key]
    return readers


def _mean_static(results: Results, keys: list[str], name: str) -> float:
    return float(np.mean(results.static(name).reindex(keys).tolist()))


def _groups(results: Results) -> dict[str, list[str]]:
    """Return the runs or models of each row: runs that differ in their seed only are one; models need statics."""
    alike: dict[tuple, list[str]] = {}
    for name in results.runs:
        about = results.about(name)
        known = about["settings"] is not None and about["seed"] is not None
        same = [str(about[field]) for field in ("method", "scale", "filter", "settings")]
        alike.setdefault((*same, str(results.spent(name, "samples_seen").tolist())) if known else (name,), []).append(
            name
        )
    rows = {}
    for names in alike.values():
        if len({results.about(name)["seed"] for name in names}) < len(names):  # one seed twice: not repetitions
            rows |= {name: [name] for name in names}
        else:
            rows[names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"] = names
    return rows | {name: [name] for name in results.models if results.static_keys([name])}


def _count(results: Results, names: list[str]) -> str:
    """Return "15 of 49" results, or "" where all are there."""
    found = total = 0
    for name in names:
        parts = [results.matrix(name, task) for task in results.tasks]
        parts += [results.static(name)] if results.static_keys([name]) else []
        found += sum(int(part.notna().to_numpy().sum()) for part in parts)
        total += sum(part.size for part in parts)
    return f"{found:,} of {total:,}" if found < total else ""


def _count_column(counts: Iterable[str]) -> dict[str, list[str]]:
    counts = list(counts)
    return {"results": [count or "all" for count in counts]} if any(counts) else {}


def comparison_csv(compared: pd.DataFrame) -> str:
    """Return the comparison in full precision, as shares of 1."""
    return compared.drop(columns="results").to_csv(index_label="run", lineterminator="\n")


def comparison_table(results: Results, compared: pd.DataFrame) -> Table:
    """Return the comparison in per cent; the best figure of each column is marked."""
    means, spreads = _figures(compared), compared.filter(regex=" sd$").astype(float)
    texts = {
        head: [percent(*pair) for pair in zip(means[head], spreads[f"{head} sd"], strict=True)]
        for head in means.columns
    }
    best = np.array(
        [[percent(value) == percent(column.max()) != MISSING for value in column] for _, column in means.items()]
    )
    macs = {"MACs": compared["MACs"].map(powers)} if compared["MACs"].notna().any() else {}
    names = {
        "run": compared.index,
        "method": compared["method"],
        "samples\nseen": compared["samples seen"].map(thousands),
    }
    sizes = " or ".join(map(str, sorted(set(compared["runs"]) - {1})))
    heads = {f"shifts ({len(SHIFTS)})": f"shifts: mean of {', '.join(SHIFTS)}"}
    notes = ["{mark}: the best of its column", *(note for head, note in heads.items() if head in means)]
    notes += ["average: mean of all static tasks"] if any(head.startswith("average (") for head in means) else []
    notes += ["MACs are those of the forward passes"] if macs else []
    notes += [f"±: standard deviation over n = {sizes} runs with different seeds"] if sizes else []
    columns = {**names, **macs, **_count_column(compared["results"])}
    columns |= {"\n".join(head.rsplit(" ", 1)): text for head, text in texts.items()}
    return Table(
        title=f"{results.benchmark.title}: {', '.join([*metric_notes(results), 'in per cent'])}",
        cells=pd.DataFrame({head: list(column) for head, column in columns.items()}),
        marked=best.T,
        legend="; ".join(notes),
        text=2,
    )


def _figures(compared: pd.DataFrame) -> pd.DataFrame:
    """Return the means of the comparison alone, as floats."""
    heads = [head.removesuffix(" sd") for head in compared.columns if head.endswith(" sd")]
    return compared[heads].astype(float)


def metric_notes(results: Results) -> list[str]:
    """Return which metric each task's numbers are."""
    return [f"{task} = {MAIN_METRIC[results.benchmark.tasks[task]]}" for task in results.tasks]


def reference_table(compared: pd.DataFrame, path: str) -> Table:
    """Return ours, published, and the difference in points, of the rows and columns that the CSV ``path`` has.

    Raises:
        TicError: a column or method matches nothing, or a cell is not a number in per cent.
    """
    ours = 100 * _figures(compared)
    try:
        published = pd.read_csv(path, index_col="method", skipinitialspace=True, encoding="utf-8-sig")
        published = published.rename(columns=str.strip, index=str.strip).astype(float)
    except (ValueError, AttributeError) as error:  # not CSV, without a column "method", or with a cell that is text
        raise TicError(f"{path} is not a table of method and numbers in per cent: {error}") from None
    rows = [
        (name, key) for name, method in compared["method"].items() for key in published.index if key in (name, method)
    ]
    for kind, used, valid in (
        ("column", published.columns, ours.columns),
        ("method", published.index, dict.fromkeys([*compared["method"], *ours.index])),
    ):
        unknown = [str(one) for one in used if one not in valid] + [str(one) for one in used[used.duplicated()]]
        if unknown:
            raise TicError(f"{path}: unknown or repeated {kind} {unknown[0]!r}; there are: {', '.join(valid)}")
    if ((published < 0) | (published > 100)).any(axis=None):
        raise TicError(f"{path}: a number is not in per cent, from 0 to 100")
    cells = {"run": [name for name, _ in rows], "method": [key for _, key in rows]}
    for head in published:
        pairs = [(ours.loc[name, head], published.loc[key, head]) for name, key in rows]
        cells[f"{head}\nours"] = [MISSING if np.isnan(value) else f"{value:.1f}" for value, _ in pairs]
        cells[f"{head}\npublished"] = [MISSING if np.isnan(value) else f"{value:.1f}" for _, value in pairs]
        differences = [MISSING if np.isnan(a - b) else f"{a - b:+.1f}".replace("-", "\u2212") for a, b in pairs]
        cells[f"{head}\ndifference"] = differences
    title = f"Beside the numbers of {Path(path).name}, in per cent"
    legend = "differences are ours - published, in points"
    return Table(title=title, cells=pd.DataFrame(cells), legend=legend, text=2)


def static_tables(results: Results) -> list[Table]:
    """Return the static tasks: a row a task; a column a step of the single run, or a run or model."""
    groups = {name: group for name, group in _groups(results).items() if results.static_keys(group)}
    if not groups:
        return []
    if results.single:
        cells = results.matrix(results.single, STATIC).map(percent).T
    else:
        values = {name: pd.DataFrame([results.static(one) for one in group]) for name, group in groups.items()}
        spread = {
            name: [*map(percent, part.mean(skipna=False), part.std(skipna=False))] for name, part in values.items()
        }
        cells = pd.DataFrame(spread, index=results.static_keys(results.names))
    return [
        Table(
            title="Static tasks, main metric in per cent",
            cells=cells.reset_index(names="task"),
            legend="of each step's model" if results.single else "of a run, the model of its last step",
            wide=cells.shape[1] > MAX_NUMBERED,
        )
    ]


def model_tables(results: Results) -> list[Table]:
    """Return models that are not runs of ours, on old and new data."""
    tasks = results.tasks
    if not results.tasks_of(results.models):
        return []
    spans = {span(part): part for part in (*old_and_new(results.benchmark), results.benchmark.periods)}
    spans["all"] = spans.pop(span(results.benchmark.periods))
    cells = {"model": results.models, "family": [results.about(name)["family"] or MISSING for name in results.models]}
    cells |= _count_column(_count(results, [name]) for name in results.models)
    for task in tasks:
        for label, periods in spans.items():
            cells[f"{task}\n{label}"] = [percent(mean_over(results, name, task, periods)[0]) for name in results.models]
    return [
        Table(
            title=f"{results.benchmark.title}: models by the time of the data, in per cent",
            cells=pd.DataFrame(cells),
            legend=f"means over the periods named; {', '.join(metric_notes(results))}",
            text=2,
        )
    ]


def old_and_new(benchmark: Benchmark) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the periods of the first step, and the last two: 2014 to 2016, 2021 and 2022 of TiC-DataComp."""
    return benchmark.steps[0].periods, benchmark.periods[-2:]


def span(periods: tuple[str, ...]) -> str:
    """Return periods in words."""
    return periods[0] if len(periods) == 1 else f"{periods[0]} to {periods[-1]}"


def mean_over(results: Results, name: str, task: str, periods: tuple[str, ...]) -> np.ndarray:
    """Return the mean over some periods at each step of a run, or of a model; NaN if one is missing."""
    return results.matrix(name, task)[list(periods)].mean(axis=1, skipna=False).to_numpy()


def data_tables(results: Results) -> list[Table]:
    """Return the samples that were scored of each period, and what was left out."""
    facts, periods = data_facts(results), list(results.benchmark.periods)
    groups: dict[tuple, list[str]] = {}
    for (name, task), part in facts.groupby(level=["run", "task"], sort=False):
        part = part.droplevel(["run", "task"])
        for key in part.index if task == STATIC else [task]:
            own = part.loc[[key]] if task == STATIC else part.reindex(periods)
            amounts = tuple(MISSING for _ in periods) if task == STATIC else tuple(_amounts(own))
            left_out = _left_out(own)
            if left_out or set(amounts) != {MISSING}:
                groups.setdefault((key, amounts, left_out), []).append(name)
    if not groups:
        return []
    tasks = [task for task, *_ in groups]
    labels = [task if tasks.count(task) == 1 else f"{task}: {shorten(names)}" for (task, *_), names in groups.items()]
    cells = pd.DataFrame([amounts for _, amounts, _ in groups], columns=periods)
    cells.insert(0, "task", labels)
    left_out = [text for *_, text in groups]
    if any(left_out):
        cells["left out"] = [text or "0" for text in left_out]
    partly = any(share < 1 for share in facts["coverage"].dropna())
    title = "Evaluation data: samples that were scored" + ", and the share of the list of UIDs that is there" * partly
    notes = ["not all were scored on the same samples"] * (len(tasks) > len(set(tasks)))
    notes += ["no sample was left out"] * (not any(left_out))
    return [Table(title=title, cells=cells, legend="; ".join(notes), wide=len(periods) > MAX_NUMBERED)]


def _amounts(facts: pd.DataFrame) -> Iterator[str]:
    """Yield the samples of each period, and the share in per cent, rounded down, if it is not all."""
    for count, share in zip(facts["num_samples"], facts["coverage"], strict=True):
        is_part = not pd.isna(share) and share < 1
        yield thousands(count) + (f" ({int(1000 * share + 1e-6) / 10:g} %)" if is_part else "")


def _left_out(facts: pd.DataFrame) -> str:
    """Return how many samples were left out, by reason, and how many features are not finite, over all periods."""
    reasons = Counter()
    for dropped in facts["dropped"].dropna():
        reasons.update(dropped)
    reasons["features not finite"] += int(facts["nonfinite"].sum())
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def shorten(names: list[str], most: int = 4) -> str:
    """Return ``names`` as a list of at most ``most``, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
