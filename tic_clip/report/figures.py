"""Draw the figures of a report, readable in greyscale and with colour-blindness."""

import io
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from tic_clip.evaluation.results import read_log
from tic_clip.report.compare import IMAGENET, SHIFTS, TRANSFERS, Compared, old_and_new
from tic_clip.report.frame import Results, Subject
from tic_clip.report.table import MAX_NUMBERED, percent

FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""File types, and the metadata to leave out so that equal figures are equal bytes."""
CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Okabe and Ito's palette for colour-blind readers, with ochre for yellow, which is faint on white."""
SERIES = cycler(color=COLOURS * 9, marker="osD^vP*Xd" * 8, linestyle=["-", "--", ":", "-."] * 18)
"""72 series, each with its own colour and marker."""
STYLE = Path(__file__).with_name("report.mplstyle")
CHANCE = {"color": "0.45", "linestyle": (0, (1, 1.5)), "marker": "none", "linewidth": 1, "label": "chance"}
MAX_LABELLED = 30
"""With more points than this, label only the last of each run."""
UNIT = 5.0e18
"""MACs of a step of TiC-DataComp-large, C in the paper's figure."""
FIGURE_1 = {
    "from scratch": [(1, 24.7), (3, 34.1), (6, 38.4), (10, 41.3), (15, 42.7), (21, 44.3), (28, 45.3)],
    "warm start + replay": [(1, 24.7), (2, 34.6), (3, 38.2), (4, 40.2), (5.5, 42.0), (7.5, 43.8), (10.5, 45.6)],
}
"""(total compute in C, accuracy in per cent) of Figure 1, right: TiC-DataComp-large, ImageNet and its distribution
shifts; read off the figure, good to about 0.3."""


def draw_figures(results: Results, compared: Compared) -> dict[str, bytes]:
    """Return file name -> bytes of each figure as PNG and SVG; b"" if there is nothing to draw."""
    drawings = {"heatmap": draw_heatmap, "bars": lambda results: draw_bars(results, compared), "curves": draw_curves}
    drawings |= {"compute": draw_compute, "robustness": draw_robustness, "training": draw_training}
    files = {}
    with mpl.rc_context({"axes.prop_cycle": SERIES}, fname=STYLE):
        for name, draw in drawings.items():
            figure = draw(results)
            for kind, metadata in FORMATS.items():
                file = io.BytesIO()
                if figure:
                    figure.savefig(file, format=kind, metadata=metadata)
                files[f"{name}.{kind}"] = file.getvalue()
    return files


def _escape(name: str) -> str:
    """Return a label that matplotlib shows as it is: it typesets $…$ and hides labels that start with _."""
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def _add_legend(figure: Figure, panel: Axes, title: str | None = None) -> None:
    """Add a legend below the panels, in as many columns as fit, and make the figure taller by it."""
    handles, labels = panel.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.5 + 0.062 * max(map(len, labels), default=1))))
    figure.set_size_inches(width, height + 0.17 * (math.ceil(len(labels) / columns) + bool(title)))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), title=title)


def _metric_label(results: Results, task: str) -> str:
    return f"{results.tasks[task].metric} (%)"


def _set_periods(panel: Axes, periods: list[str]) -> None:
    stride = math.ceil(len(periods) / MAX_NUMBERED)
    panel.set_xticks(range(0, len(periods), stride), periods[::stride], rotation=45, ha="right", rotation_mode="anchor")
    panel.set_xlabel("evaluated on")


def draw_heatmap(results: Results) -> Figure | None:
    """Draw the matrix of each task and run: the tasks of one run side by side, or several runs, four in a row."""
    runs, single = results.groups, results.single
    tasks = [task for task in results.tasks if any(task in run.tasks for run in runs)]
    if not tasks:
        return None
    lines = math.ceil(len(runs) / 4)
    across, down = (len(tasks), 1) if single else (math.ceil(len(runs) / lines), len(tasks) * lines)
    figure = Figure(figsize=(4.2 * across + 0.7, 3.8 * down + 0.5))
    panels = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(panels, tasks, strict=True):
        grids = [100 * run.matrix(task) for run in runs]
        grids = [grid.dropna(how="all") for grid in grids] if single else grids
        low, high = results.limits[task]
        limits = {"vmin": 100 * low, "vmax": 100 * high}
        for panel, run, grid in zip(row, runs, grids, strict=False):
            image = panel.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", **limits)
            panel.set_title(task if single else f"{task}: {_escape(run.name)}")
            _finish_matrix(panel, run, task, grid, image.to_rgba(grid.to_numpy()))
        for panel in row[len(runs) :]:
            panel.set_axis_off()
        figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.02, label=_metric_label(results, task))
    figure.suptitle(_escape(results.title) + (f", {single.about['method']}" if single else ""), fontsize=13)
    return figure


def _finish_matrix(panel: Axes, run: Subject, task: str, grid: pd.DataFrame, colours: np.ndarray) -> None:
    """Label a matrix, outline each step's own periods and write the numbers in a readable colour."""
    _set_periods(panel, list(grid.columns))
    panel.set_yticks([])
    if panel.get_subplotspec().is_first_col():
        stride = math.ceil(len(grid) / MAX_NUMBERED)
        panel.set_yticks(range(0, len(grid), stride), grid.index[::stride])
        panel.set_ylabel("trained up to")
    panel.tick_params(length=0)
    panel.set_facecolor("0.88")  # shows through where a result is missing
    panel.spines[:].set_visible(False)
    is_numbered, own = grid.shape[1] <= MAX_NUMBERED, run.known[task].periods_of(run.benchmark)
    for step, periods in zip(run.steps, own, strict=True):
        if step in grid.index and periods:
            corner = grid.columns.get_loc(periods[0]) - 0.5, grid.index.get_loc(step) - 0.5
            width = 1.6 if is_numbered else 0.6
            panel.add_patch(Rectangle(corner, len(periods), 1, fill=False, clip_on=False, linewidth=width))
    for (i, j), value in np.ndenumerate(grid) if is_numbered else ():
        is_dark = np.isfinite(value) and colours[i, j, :3] @ (0.299, 0.587, 0.114) < 0.5
        colour, size = "white" if is_dark else "black", 8 if grid.shape[1] < 10 else 6.5
        panel.text(j, i, percent(value / 100), ha="center", va="center", fontsize=size, color=colour)


def draw_bars(results: Results, compared: Compared) -> Figure | None:
    """Draw the three transfers of each task: a bar for each run, with its deviation over seeds, else its interval."""
    runs = [one for one in results.groups if one.tasks]
    if len(runs) < 2:
        return None
    figure = Figure(figsize=(max(8.5, max(5.2, 0.5 * len(runs) + 1.2) * len(results.tasks)), 3.6))
    panels, width = figure.subplots(1, len(results.tasks), squeeze=False)[0], 0.8 / len(runs)
    for panel, task in zip(panels, results.tasks, strict=True):
        heads = [f"{task} {head}" for head in TRANSFERS.values()]
        for i, (name, look) in enumerate(zip([run.name for run in runs], SERIES, strict=False)):
            values = compared.table.loc[name, heads].astype(float)
            deviations, errors = (compared.table.loc[name, [f"{h} {kind}" for h in heads]] for kind in ("sd", "error"))
            spread = 100 * np.where(pd.isna(deviations), errors, deviations).astype(float)
            style = {
                "color": look["color"],
                "edgecolor": "white",
                "hatch": ["", "///", "..", "xx"][i // len(COLOURS) % 4],
            }
            at = np.arange(3) + (i - (len(runs) - 1) / 2) * width
            panel.bar(at, 100 * values, width, label=_escape(name), **style)
            panel.errorbar(at, 100 * values, spread, fmt="none", ecolor="0.35", elinewidth=0.8, capsize=1.5)
        chance = [run.chance(task).mean(skipna=False) for run in runs if task in run.tasks]
        if len(chance) and np.isfinite(chance[0]):
            panel.axhline(100 * chance[0], **CHANCE)
        panel.set_xticks(range(3), TRANSFERS.values())
        panel.set(title=task, ylabel=_metric_label(results, task))
    _add_legend(figure, panels[0])
    return figure


def draw_curves(results: Results) -> Figure | None:
    """Draw the main metric over the periods: up to eight steps of a single run, or the last model of each run."""
    if not results.tasks:
        return None
    run, rows = results.single, results.rows
    if run:
        steps = [step for step in run.steps if any(run.matrix(task).loc[step].notna().any() for task in run.tasks)]
        chosen = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).round().astype(int))
        lines = {steps[i]: (run, steps[i]) for i in chosen}
    else:
        ends = [f" (up to {one.last_step})" if one.last_step != one.steps[-1] else "" for one in rows]
        lines = {one.name + end: (one, one.last_step) for one, end in zip(rows, ends, strict=True)}
    figure = Figure(figsize=(max(8.5, 5.2 * len(results.tasks) + 0.4), 3.6))
    panels = figure.subplots(1, len(results.tasks), squeeze=False)[0]
    for panel, (task, about) in zip(panels, results.tasks.items(), strict=True):
        size = {} if len(about.periods) <= MAX_NUMBERED else {"markersize": 0}
        for (label, (one, step)), look in zip(lines.items(), SERIES, strict=False):
            values = 100 * one.matrix(task).loc[step].to_numpy()
            panel.plot(range(len(values)), values, label=_escape(label), **look | size)
        chances = [chance for one in rows if (chance := one.chance(task)).notna().any()]
        if chances:
            panel.plot(range(len(chances[0])), 100 * chances[0].to_numpy(), **CHANCE)
        _set_periods(panel, about.periods)
        panel.set(ylabel=_metric_label(results, task), title=task)
        panel.set_ylim(bottom=0)
    _add_legend(figure, panels[0], "trained up to" if run else None)
    return figure


def draw_compute(results: Results) -> Figure | None:
    """Draw accuracy against total compute: a line for each run, a point for each step.

    Accuracy is the mean of ImageNet and its shifts, beside the paper's points, or else the first task's mean.
    """
    task, keys, runs = next(iter(results.tasks), None), [IMAGENET, *SHIFTS], results.groups
    accuracy = {run.name: run.static.reindex(columns=keys).to_numpy().mean(axis=1) for run in runs}
    what, paper = "ImageNet and its shifts", FIGURE_1
    if task and not any(np.isfinite(values).any() for values in accuracy.values()):
        accuracy = {run.name: run.mean_over(task, [run.known[task].periods])[:, 0] for run in runs}
        what, paper = f"mean {task} over all periods", {}
    figure = Figure(figsize=(7.4, 4.4))
    panel, is_empty = figure.subplots(), True
    for run, look in zip(runs, SERIES, strict=False):
        points = np.stack([run.spent["macs_seen"].astype(float), 100 * accuracy[run.name]], axis=1)
        shown = np.isfinite(points).all(axis=1)
        if shown.any():
            panel.plot(*points[shown].T, label=_escape(run.name), **look)
            labels = [step for step, is_shown in zip(run.steps, shown, strict=True) if is_shown]
            _label_points(panel, points[shown], labels, look["color"], len(runs) * len(labels))
            is_empty = False
    if is_empty:
        return None
    for line, (name, part) in zip((":", "--"), paper.items(), strict=False):
        x, y = np.array(part).T
        label = f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)"
        panel.plot(UNIT * x, y, color="0.55", marker="x", linestyle=line, label=label)
    title = f"{_escape(results.title)}: accuracy for compute"
    panel.set(xscale="log", xlabel="total compute (MACs of the forward passes)", ylabel=f"{what} (%)", title=title)
    _add_legend(figure, panel)
    return figure


def _label_points(panel: Axes, points: np.ndarray, labels: list[str], colour: object, total: int) -> None:
    """Label each of ``points`` (N, 2), or only the last if the figure has too many."""
    chosen = slice(None if total <= MAX_LABELLED else -1, None)
    for point, label in zip(points[chosen], labels[chosen], strict=True):
        panel.annotate(_escape(label), point, (4, 3), textcoords="offset points", fontsize=6, color=colour)


def draw_robustness(results: Results) -> Figure | None:
    """Draw retrieval on new against old data: a line for each run, a point for each model, a fit for each family."""
    kinds = {label: task.benchmark.tasks[task.name] for label, task in results.tasks.items()}
    task = next((label for label, kind in kinds.items() if kind == "retrieval"), next(iter(kinds), None))
    series: dict[tuple[bool, str], list] = {}
    for one in results.rows if task else ():
        spans = old_and_new(one.known[task])
        points = 100 * one.mean_over(task, list(spans.values())[:2])
        label = one.name if one.is_run else one.about["family"] or one.name
        names = one.steps if one.is_run else [one.name]
        found = [(*point, name) for point, name in zip(points, names, strict=True) if np.isfinite(point).all()]
        series.setdefault((one.is_run, label), []).extend(found)
    series = {key: found for key, found in series.items() if found}
    if not series:
        return None
    figure = Figure(figsize=(5.6, 5.4))
    panel = figure.subplots()
    for ((is_run, name), found), look in zip(series.items(), SERIES, strict=False):
        *points, labels = zip(*found, strict=True)
        x, y = np.array(points)
        panel.plot(
            x, y, label=_escape(name), **look | ({} if is_run else {"linestyle": "none", "markerfacecolor": "white"})
        )
        _label_points(panel, np.array(points).T, list(labels), look["color"], is_run * sum(map(len, series.values())))
        if not is_run and np.ptp(x) > 0:
            fitted = np.polyval(np.polyfit(x, y, 1), np.sort(x))
            panel.plot(np.sort(x), fitted, color=look["color"], marker="none", linestyle="-")
    old, new, _ = spans
    title = f"{_escape(results.title)}: new against old"
    panel.set(xlabel=f"{task} on {old} (%)", ylabel=f"{task} on {new} (%)", title=title, aspect="equal")
    low, high = (pick(*panel.get_xlim(), *panel.get_ylim()) for pick in (min, max))
    panel.axline((low, low), slope=1, color="0.7", linestyle="--", marker="none", zorder=0, label="as good on both")
    panel.set(xlim=(low, high), ylim=(low, high))
    _add_legend(figure, panel)
    return figure


def draw_training(results: Results) -> Figure | None:
    """Draw the training log against samples seen: a line for each run; mark the steps of a single run."""
    logs = {run.name: read_log(run.folder, run.steps) for run in results.runs}
    logs = {name: steps for name, steps in logs.items() if any(steps)}
    if not logs:
        return None
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(2.2, 1, 1))
    for panel, (key, label) in zip(panels, CURVES.items(), strict=True):
        for (name, steps), look in zip(logs.items(), SERIES, strict=False):
            lines = [line for step in steps for line in step]
            values = [line.get("contrastive_loss", line[key]) if key == "loss" else line[key] for line in lines]
            panel.plot(
                [line["samples_seen"] for line in lines], values, label=_escape(name), **look | {"marker": "none"}
            )
        for step in filter(None, steps if len(logs) == 1 else ()):
            panel.axvline(step[-1]["samples_seen"], color="0.8", linewidth=0.8, zorder=0, marker="none")
        panel.set_ylabel(label)
    panels[-1].set_xlabel("samples seen")
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(logs) > 1:
        _add_legend(figure, panels[0])
    return figure
