"""The tables of a report: matrices, the comparison, published numbers, static tasks, models, evaluation data."""

from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.metrics import TRANSFERS as ORDER
from tic_clip.metrics import transfer, transfer_cells
from tic_clip.report.compare import ABOUT, MISSING, SHIFTS, TRANSFERS, count_results, list_settings
from tic_clip.report.frame import DATA, Results, Subject

MARK = "*"
NEAR = "~"
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
        padded = [cell if cell.endswith((MARK, NEAR)) else f"{cell} " for cell in column]
        width = max(map(len, padded))
        columns.append([cell.ljust(width) if j < table.text else cell.rjust(width) for cell in padded])
    aligned = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, "", *aligned, "", table.legend])


def headline_tables(results: Results, compared: pd.DataFrame, reference: str | None = None) -> list[Table]:
    """Return the matrices of a single row, else the comparison of runs and models; then what stands beside it."""
    tables = matrix_tables(results.single) if results.single else []
    if results.runs or results.static_keys:
        tables += [comparison_table(results, compared)] if not tables or len(results.runs) > 1 else []
    tables += common_tables(results)
    tables += [reference_table(results, compared, reference)] if reference else []
    tables += [static_table(results, compared)] if results.static_keys else []
    return tables + ([models_table(results, compared)] if any(one.tasks for one in results.models) else [])


def metric_notes(results: Results) -> list[str]:
    """Return which metric each task's numbers are."""
    return [f"{label} = {task.metric}" for label, task in results.tasks.items()]


def matrix_tables(run: Subject) -> list[Table]:
    """Return the matrix of each task of a run, its own periods marked, without the steps that have no result."""
    tables = []
    for label in run.tasks:
        task, values = run.known[label], run.matrix(label)
        shown = values.dropna(how="all")
        is_complete, square = len(shown) == len(values), run.square_matrix(label)
        transfers = run.transfer(label) if is_complete else transfer(square, np.isfinite(square))
        counts = count_cells(np.isfinite(square)) if not is_complete else dict.fromkeys(transfers, "")
        spread = {key: pd.Series([one.transfer(label)[key] for one in run.members]).std() for key in ORDER}
        figures = {key: percent(transfers[key], spread[key] if is_complete else np.nan) + counts[key] for key in ORDER}
        legend = ", ".join(f"{TRANSFERS[key]} {figures[key]}" for key in ORDER)
        legend += f" ({MARK}: a step's model on the step's own periods)"
        width = run.half_widths(label).stack().mean()
        legend += "" if pd.isna(width) else f"; a cell is good to ± {100 * width:.1f} on average (95 %)"
        found = int(values.notna().sum(axis=None))
        legend += f"; results {found:,} of {values.size:,}" if found < values.size else ""
        legend += f"; mean over {len(run.members)} seeds" if len(run.members) > 1 else ""
        cells = shown.map(percent)
        for step, own in zip(run.steps, task.periods_of(run.benchmark), strict=True):
            if step in cells.index:
                cells.loc[step, own] += MARK
        title = f"{task.benchmark.title}, {run.about['method']}: {task.name}, {task.metric} in per cent"
        tables.append(Table(title, cells.reset_index(names="trained up to"), legend))
    return tables


def count_cells(where: np.ndarray) -> dict[str, str]:
    """Return, of each transfer, how many of its cells (T, T) are there: " (over 6 of 21)"."""
    masks = transfer_cells(len(where))
    return {key: f" (over {(mask & where).sum()} of {mask.sum()})" for key, mask in masks.items()}


def common_tables(results: Results) -> list[Table]:
    """Return the means over the results that all runs have, of each task of which some run lacks steps."""
    tables = []
    for label, task in results.tasks.items() if len(results.groups) > 1 else ():
        rows = [one for one in results.groups if label in one.tasks and one.benchmark == results.groups[0].benchmark]
        squares = [one.square_matrix(label) for one in rows]
        common = np.isfinite(squares).all(axis=0)
        if len(rows) < 2 or not common.any() or all(np.isfinite(square).all() for square in squares):
            continue
        counts = count_cells(common)
        means = [transfer(square, common) for square in squares]
        cells = {"run": [one.name for one in rows], "method": [one.about["method"] for one in rows]}
        cells |= {head: [percent(each[key]) for each in means] for key, head in TRANSFERS.items()}
        legend = ", ".join(f"{head}{counts[key]}" for key, head in TRANSFERS.items())
        title = f"{task.benchmark.title}: {label} in per cent, means over the results that all runs have"
        tables.append(Table(title, pd.DataFrame(cells), legend, text=2))
    return tables


def matrix_csv(results: Results) -> str:
    """Return every cell of every task in full precision; empty where there is no result."""
    parts = {(one.name, task): one.matrix(task) for one in results.subjects for task in one.tasks}
    parts = parts or {("", ""): pd.DataFrame(columns=results.benchmark.periods)}
    table = pd.concat(parts, names=["run", "task", "step"])
    return (table.droplevel("run") if len(results.subjects) == 1 and results.runs else table).to_csv(
        lineterminator="\n"
    )


def _figure_heads(results: Results, compared: pd.DataFrame) -> list[str]:
    """Return the heads of the figures in the order of the paper's table, without static tasks and spans."""
    heads = [head for head in compared if f"{head} sd" in compared and "\n" not in head]
    return [head for head in heads if head not in results.static_keys]


def comparison_csv(results: Results, compared: pd.DataFrame) -> str:
    """Return the comparison in full precision, as shares of 1."""
    heads = [column for head in _figure_heads(results, compared) for column in (head, f"{head} sd")]
    spans = [head for head in compared if "\n" in head and not head.endswith((" sd", " error"))]
    table = compared[[*ABOUT[:-1], *heads, *spans, "settings"]].rename(columns=lambda head: head.replace("\n", " "))
    return table.to_csv(index_label="run", lineterminator="\n")


def _write_figures(compared: pd.DataFrame, head: str) -> list[str]:
    return list(map(percent, compared[head], compared[f"{head} sd"]))


def mark_best(compared: pd.DataFrame, head: str) -> list[str]:
    """Return the figures in per cent: the best of each group of settings marked, and what is within noise of it."""
    marks = pd.Series("", index=compared.index)
    groups = compared["settings"] if compared["settings"].nunique() > 1 else pd.Series("", index=compared.index)
    for _, group in compared.groupby(groups, dropna=False):
        values, errors = group[head], group[f"{head} error"]
        best = values.map(percent) == percent(values.max())
        noise = np.hypot(errors, errors.get(values.idxmax()) if values.notna().any() else np.nan)
        marks[group.index[values.max() - values <= noise]] = NEAR
        marks[group.index[best & values.notna()]] = MARK
    return [text + mark for text, mark in zip(_write_figures(compared, head), marks, strict=True)]


def comparison_table(results: Results, compared: pd.DataFrame) -> Table:
    """Return the comparison in per cent; the best figure of each column is marked."""
    heads, notes = _figure_heads(results, compared), [f"{MARK}: the best of its column"]
    compared = compared[[one.is_run or bool(len(one.static.columns)) for one in results.rows]]
    cells = compared[["method"]].assign(**{"samples\nseen": compared["samples seen"].map(number)})
    if compared["settings"].nunique() > 1:
        cells.insert(1, "settings", compared["settings"].fillna(MISSING))
        told = list_settings(results, compared["settings"])
        notes = [f"{MARK}: the best of its column among runs with equal settings", *told]
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
        cells["\n".join(head.rsplit(" ", 1))] = mark_best(compared, head)
    if any(cells[column].str.endswith(NEAR).any() for column in cells):
        notes.insert(1, f"{NEAR}: within noise of it, by the 95 % intervals")
    title = f"{results.title}: {', '.join([*metric_notes(results), 'in per cent'])}"
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
    if results.single and len(results.runs) == 1:
        cells, legend = results.single.static.dropna(how="all").map(percent).T, "of each step's model"
    else:
        some = compared.dropna(subset=results.static_keys, how="all")
        cells = pd.DataFrame({key: _write_figures(some, key) for key in results.static_keys}, index=some.index).T
        legend = "of a run, the model of its last step"
    cells = cells.reset_index(names="task", allow_duplicates=True)
    return Table("Static tasks, main metric in per cent", cells, legend)


def models_table(results: Results, compared: pd.DataFrame) -> Table:
    """Return models that are not runs of ours, on old and new data."""
    some = compared.loc[[one.name for one in results.models if one.tasks]]
    cells = {"model": list(some.index), "family": list(some["method"])}
    counts = [count_results(results, [one]) for one in results.models if one.tasks]
    cells |= {"results": counts} if set(counts) != {"all"} else {}
    cells |= {head: list(map(percent, some[head])) for head in some if "\n" in head and f"{head} sd" in some}
    legend = f"means over the periods named; {', '.join(metric_notes(results))}"
    return Table(f"{results.title}: models by the time of the data, in per cent", pd.DataFrame(cells), legend, text=2)


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
    """Return what was run: settings, how far, when, by which command and with which versions; a column a run."""
    columns = {}
    for one in results.subjects:
        seen, plan = one.spent["samples_seen"].dropna(), one.plan
        about = {
            "method": one.about["method"],
            "family": one.about["family"],
            **one.settings,
            "seed": one.about["seed"],
        }
        about |= {"samples seen": seen.max(), "steps": f"{len(seen)} of {len(one.steps)}" if one.is_run else None}
        about |= {"finished": plan.get("finished"), "command": " ".join(plan.get("command", [])) or None}
        about["trained at commit"] = plan.get("pins", {}).get("tic_clip")
        pins = summaries[one.name]["pins"].items()
        columns[one.name] = about | {"versions": ", ".join(f"{name} {version}" for name, version in pins) or None}
    cells = pd.DataFrame(columns, dtype=object).dropna(how="all")
    cells = cells.map(
        lambda value: MISSING if pd.isna(value) else f"{value:,}" if isinstance(value, int) else str(value)
    )
    return Table("What was run", cells.reset_index(names=""), text=1 + len(columns))
