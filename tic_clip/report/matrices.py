"""The step × period matrices of a report, and means over the results that several runs have."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from tic_clip.metrics import TRANSFERS as ORDER
from tic_clip.metrics import transfer, transfer_cells
from tic_clip.report.compare import TRANSFERS
from tic_clip.report.frame import Results, Subject
from tic_clip.report.table import MARK, Table, percent


def matrix_tables(run: Subject, results: Results) -> list[Table]:
    """Return the matrix of each task of a run, with each step's own periods marked; skip steps without results."""
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
            if own and step in cells.index:
                cells.loc[step, own] += MARK
        title = f"{task.benchmark.title}, {run.about['method']}: {task.name}, {task.metric} in per cent"
        look = {"shades": shade(shown, results.limits[label]), "hover": describe_cells(run, label, shown)}
        tables.append(Table(title, cells.reset_index(names="trained up to"), legend, **look))
    return tables


def shade(values: pd.DataFrame, limits: tuple[float, float]) -> list[list[str]]:
    """Return the CSS of each cell: a colour on the scale between the limits, and black or white text."""
    low, high = limits
    colours = mpl.colormaps["cividis"]((values.to_numpy() - low) / ((high - low) or 1))
    light = colours[..., :3] @ (0.299, 0.587, 0.114) > 0.5
    styles = [
        [
            f"background:{to_hex(colour)};color:{'#000' if is_light else '#fff'}"
            for colour, is_light in zip(*row, strict=True)
        ]
        for row in zip(colours, light, strict=True)
    ]
    return np.where(values.notna(), styles, " ").tolist()


def describe_cells(run: Subject, task: str, shown: pd.DataFrame) -> list[list[str]]:
    """Return the tooltip of each cell."""
    columns = ("value", "low", "high", "num_samples")
    facts = np.stack([run.matrix(task, column).loc[shown.index].to_numpy(dtype=float) for column in columns], axis=-1)

    def describe_cell(step: str, period: str, chance: float, fact: np.ndarray) -> str:
        value, low, high, samples = fact
        said = f"trained up to {step}, on {period}: {percent(value)}"
        said += "" if np.isnan(low) else f" (95 %: {percent(low)} to {percent(high)})"
        said += "" if np.isnan(samples) else f", {samples:,.0f} samples"
        return said + ("" if np.isnan(chance) else f", chance {percent(chance)}")

    chances = run.chance(task).to_numpy(dtype=float)
    return [
        [describe_cell(step, *of_cell) for of_cell in zip(shown, chances, row, strict=True)]
        for step, row in zip(shown.index, facts, strict=True)
    ]


def count_cells(where: np.ndarray) -> dict[str, str]:
    """Return how many cells (T, T) of each transfer are there, as " (over 6 of 21)"."""
    masks = transfer_cells(len(where))
    return {key: f" (over {(mask & where).sum()} of {mask.sum()})" for key, mask in masks.items()}


def common_tables(results: Results) -> list[Table]:
    """Return the means over the results that all runs have, for each task with missing results."""
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
    """Return all cells of all tasks in full precision; missing ones are empty."""
    parts = {(one.name, task): one.matrix(task) for one in results.subjects for task in one.tasks}
    parts = parts or {("", ""): pd.DataFrame(columns=results.benchmark.periods)}
    table = pd.concat(parts, names=["run", "task", "step"])
    return (table.droplevel("run") if len(results.subjects) == 1 and results.runs else table).to_csv(
        lineterminator="\n"
    )
