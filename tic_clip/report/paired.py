"""Test whether two runs or models differ, by a paired bootstrap over samples."""

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.evaluation.results import read_hits
from tic_clip.metrics import TRANSFERS, paired_test, resample, transfer_cells
from tic_clip.report.frame import Results, Subject
from tic_clip.report.table import MARK, MISSING, Table, number, percent

LEVEL = 0.05
COLUMNS = ["task", "step", "period", "first", "second", "difference", "low", "high", "p"]
Cells = dict[tuple[str, str], np.ndarray]


def compare_pair(results: Results) -> pd.DataFrame:
    """Return ``COLUMNS`` for each cell that both have hits of, and for each transfer, as a period of the step ""."""
    if len(results.subjects) != 2 or len(results.runs) == 1:
        raise TicError(f"--paired needs two runs or two models, not {', '.join(one.name for one in results.subjects)}")
    first, second = results.subjects
    rows = [[task, *row] for task in results.tasks for row in _compare_task(first, second, task)]
    if not rows:
        names = f"{first.name} and {second.name}"
        raise TicError(f"{names} have no hits in common: run scripts/evaluate.py --force for both")
    return pd.DataFrame(rows, columns=COLUMNS)


def _compare_task(first: Subject, second: Subject, task: str) -> list[list]:
    """Return the rows of a task; the resamples of a period are the same for all steps."""
    ours, theirs = _read_cells(first, task), _read_cells(second, task)
    cells: Cells = {}  # (2 + R,): the mean of both and of each draw
    for seed, period in enumerate(first.known[task].periods):
        steps = [step for step in first.steps if (step, period) in ours.keys() & theirs.keys()]
        pairs = [(ours[step, period], theirs[step, period]) for step in steps]
        for (own, own_data), (other, other_data) in pairs:
            if own_data != other_data or len(own) != len(other):
                raise TicError(f"{first.name} and {second.name} were evaluated on different data of {task}, {period}")
        if pairs:
            both = np.array([[hits for hits, _ in pair] for pair in pairs])  # (S, 2, N)
            drawn = resample((both[:, 0] - both[:, 1]).T, seed) / both.shape[2]
            values = np.hstack([both.mean(axis=2), drawn])
            cells |= {(step, period): row for step, row in zip(steps, values, strict=True)}
    ordered = {cell: cells[cell] for step in first.steps for cell in cells if cell[0] == step}
    means = _mean_transfers(first, task, cells) if first.is_run else {}
    return [[*cell, *_test(values)] for cell, values in (means | ordered).items()]


def _read_cells(one: Subject, task: str) -> dict[tuple[str, str], tuple[np.ndarray, str]]:
    """Return (step, period) -> hits (N,) and the fingerprint of the data."""
    rows = one.frame[one.frame["task"] == task]
    found = {}
    for row in rows.to_dict("records"):
        hits = read_hits(one.folder, (row["model"] or {}).get("name", ""), row["key"])
        if hits is not None:
            found[row["step"], row["period"]] = hits, row["data"]
    return found


def _mean_transfers(run: Subject, task: str, cells: Cells) -> Cells:
    """Return the mean of the cells of each transfer, first over the periods of a step."""
    own, means = run.known[task].periods_of(run.benchmark), {}
    for name, mask in transfer_cells(len(run.steps)).items():
        groups = [[cells.get((run.steps[i], period)) for period in own[j]] for i, j in np.argwhere(mask)]
        complete = [np.mean(group, axis=0) for group in groups if group and all(part is not None for part in group)]
        means |= {("", name): np.mean(complete, axis=0)} if complete else {}
    return means


def _test(values: np.ndarray) -> list[float]:
    low, high, p = paired_test(values[2:])
    return [*values[:2], values[0] - values[1], low, high, p]


def paired_tables(results: Results, pairs: pd.DataFrame) -> list[Table]:
    """Return two tables for each task: the transfers with interval and p, and the difference of each cell."""
    first, second = (one.name for one in results.subjects)
    tables, legend = [], f"{MARK}: p < {LEVEL}"
    marks = np.where(pairs["p"] < LEVEL, MARK, "")
    pairs = pairs.assign(points=pairs["difference"].map(lambda value: number(100 * value, "+.1f")) + marks)
    for task, rows in pairs.groupby("task", sort=False):
        is_mean = (rows["step"] == "") & rows["period"].isin(TRANSFERS)
        means, cells = rows[is_mean], rows[~is_mean]
        title = f"{results.title}: {task}, {first} - {second}, in points"
        interval = [
            f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in zip(means["low"], means["high"], strict=True)
        ]
        table = {"": means["period"].replace("id", "ID"), first: means["first"].map(percent)}
        table |= {second: means["second"].map(percent), "difference": means["points"], "95 %": interval}
        if len(means):
            tables.append(Table(title, pd.DataFrame(table | {"p": means["p"].map("{:.3f}".format)}), legend))
        matrix = cells.pivot(index="step", columns="period", values="points").fillna(MISSING)
        columns = [period for period in results.tasks[task].periods if period in matrix]
        matrix = matrix.reindex(index=cells["step"].unique(), columns=columns)
        tables.append(Table(f"{title}, of each cell", matrix.reset_index(names="trained up to"), legend))
    return tables
