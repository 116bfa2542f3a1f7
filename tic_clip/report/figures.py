"""The figures of a report, readable in grey and for the colour-blind."""

import io
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from tic_clip.evaluation.results import read_log
from tic_clip.metrics import MAIN_METRIC
from tic_clip.report.frame import Results, Subject
from tic_clip.report.tables import IMAGENET, MAX_NUMBERED, MISSING, SHIFTS, mean_over, old_and_new

FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""File types, and what is left out of them so that equal figures are equal bytes."""
CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Those of Okabe and Ito, which the colour-blind tell apart; ochre for yellow, which is faint on white."""
SHIFTED = [i + i // len(COLOURS) for i in range(64)]
SERIES = cycler(
    color=COLOURS * 8,
    marker=["osD^vP*X"[i % 8] for i in SHIFTED],
    linestyle=[("-", "--", ":", "-.")[i % 4] for i in SHIFTED],
)
"""64 series, each with a colour, marker and line of its own."""
STYLE = Path(__file__).with_name("report.mplstyle")
UNIT = 5.0e18
"""MACs of a step of TiC-DataComp-large, C in the paper's figure."""
FIGURE_1 = {
    "from scratch": [(1, 24.7), (3, 34.1), (6, 38.4), (10, 41.3), (15, 42.7), (21, 44.3), (28, 45.3)],
    "warm start + replay": [(1, 24.7), (2, 34.6), (3, 38.2), (4, 40.2), (5.5, 42.0), (7.5, 43.8), (10.5, 45.6)],
}
"""(total compute in C, accuracy in per cent) of Figure 1, right: TiC-DataComp-large, ImageNet and its distribution
shifts; read off the figure, good to about 0.3."""


def draw_figures(results: Results) -> dict[str, dict[str, bytes]]:
    """Return the PNG and SVG of each figure, {} for one that has nothing to show; equal results give equal bytes."""
    drawings = {"heatmap": draw_heatmap, "curves": draw_curves, "compute": draw_compute}
    drawings |= {"robustness": draw_robustness, "training": draw_training}
    with mpl.rc_context({"axes.prop_cycle": SERIES}, fname=STYLE):
        figures = {name: draw(results) for name, draw in drawings.items()}
        return {name: {kind: _save(figure, kind) for kind in FORMATS if figure} for name, figure in figures.items()}


def _save(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=FORMATS[kind])
    return file.getvalue()


def _escape(name: str) -> str:
    """Return ``name`` as a label: matplotlib sets what is between dollars as a formula and hides a leading _."""
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def _set_periods(panel: Axes, periods: tuple[str, ...]) -> None:
    stride = math.ceil(len(periods) / MAX_NUMBERED)
    panel.set_xticks(range(0, len(periods), stride), periods[::stride], rotation=45, ha="right", rotation_mode="anchor")
    panel.set_xlabel("evaluated on")


def draw_heatmap(results: Results) -> Figure | None:
    """Draw the matrix of each task and run: of one run, its tasks side by side; of several, four runs in a row."""
    runs = results.runs
    tasks = [task for task in results.tasks if any(task in run.tasks for run in runs)]
    if not tasks:
        return None
    one, lines = len(runs) == 1, math.ceil(len(runs) / 4)
    across, down = (len(tasks), 1) if one else (math.ceil(len(runs) / lines), len(tasks) * lines)
    size = 4.8 if one else 3.6
    figure = Figure(figsize=(size * across + 0.7, size * down * 0.92 + 0.5))
    panels = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(panels, tasks, strict=True):
        grids = [100 * run.matrix(task).to_numpy() for run in runs]
        limits = {"vmin": np.nanmin(grids), "vmax": np.nanmax(grids)}
        for panel, run, grid in zip(row, runs, grids, strict=False):
            image = panel.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", **limits)
            panel.set_title(task if one else f"{task}: {_escape(run.name)}")
            _finish_matrix(panel, run, grid, image.to_rgba(grid))
        for panel in row[len(runs) :]:
            panel.set_axis_off()
        bar = figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.02)
        bar.set_label(f"{MAIN_METRIC[results.benchmark.tasks[task]]} (%)")
        bar.outline.set_visible(False)
    method = f", {runs[0].about['method']}" if one else ""
    figure.suptitle(_escape(f"{results.benchmark.title}{method}"), fontsize=13, fontweight="bold")
    return figure


def _finish_matrix(panel: Axes, run: Subject, grid: np.ndarray, colours: np.ndarray) -> None:
    """Label a matrix, outline each step's own periods and write the numbers, dark on light and light on dark."""
    _set_periods(panel, run.benchmark.periods)
    panel.set_yticks([])
    if panel.get_subplotspec().is_first_col():
        stride = math.ceil(len(run.steps) / MAX_NUMBERED)
        panel.set_yticks(range(0, len(run.steps), stride), run.steps[::stride])
        panel.set_ylabel("trained up to")
    panel.tick_params(length=0)
    panel.set_facecolor("0.88")  # shows through where a result is missing
    panel.spines[:].set_visible(False)
    is_numbered, start = grid.shape[1] <= MAX_NUMBERED, -0.5
    for i, step in enumerate(run.benchmark.steps):
        width = 1.6 if is_numbered else 0.6
        panel.add_patch(Rectangle((start, i - 0.5), len(step.periods), 1, fill=False, clip_on=False, linewidth=width))
        start += len(step.periods)
    for (i, j), value in np.ndenumerate(grid) if is_numbered else ():
        is_dark = np.isfinite(value) and colours[i, j, :3] @ (0.299, 0.587, 0.114) < 0.5
        text, colour = MISSING if np.isnan(value) else f"{value:.1f}", "white" if is_dark else "black"
        panel.text(j, i, text, ha="center", va="center", fontsize=8 if grid.shape[1] < 10 else 6.5, color=colour)


def draw_curves(results: Results) -> Figure | None:
    """Draw the main metric over the periods: of at most eight steps of a single run, else of each last model."""
    if not results.tasks:
        return None
    periods, run = results.benchmark.periods, results.single
    figure = Figure(figsize=(5.2 * len(results.tasks) + 1.6, 3.9))
    panels = figure.subplots(1, len(results.tasks), squeeze=False)[0]
    for panel, task in zip(panels, results.tasks, strict=True):
        if run:
            lines = {step: run.matrix(task).loc[step] for step in run.steps[:: math.ceil(len(run.steps) / 8)]}
        else:
            last = [(one, one.last_step) for one in results.subjects if task in one.tasks]
            names = [one.name + (f" (up to {step})" if step != one.steps[-1] else "") for one, step in last]
            lines = {name: one.matrix(task).loc[step] for name, (one, step) in zip(names, last, strict=True)}
        for label, values in lines.items():
            size = {} if len(periods) <= MAX_NUMBERED else {"markersize": 0}
            panel.plot(range(len(periods)), 100 * values.to_numpy(), label=_escape(label), **size)
        _set_periods(panel, periods)
        panel.set(ylabel=f"{MAIN_METRIC[results.benchmark.tasks[task]]} (%)", title=task)
        panel.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="trained up to" if run else None)
    return figure


def draw_compute(results: Results) -> Figure | None:
    """Draw accuracy against total compute: a line a run, a point a step.

    It is the mean of ImageNet and its shifts, beside the paper's points, or without them the first task's mean.
    """
    task, keys = (results.tasks or list(results.benchmark.tasks))[0], [IMAGENET, *SHIFTS]
    accuracy = {run.name: run.static.reindex(columns=keys).to_numpy().mean(axis=1) for run in results.runs}
    has_static = any(np.isfinite(values).any() for values in accuracy.values())
    if not has_static:
        accuracy = {run.name: mean_over(run, task, results.benchmark.periods) for run in results.runs}
    macs = {run.name: run.spent["macs_seen"].to_numpy(dtype=float) for run in results.runs}
    points = {
        name: np.stack([macs[name], 100 * accuracy[name]])[:, np.isfinite(macs[name] + accuracy[name])] for name in macs
    }
    if not any(one.size for one in points.values()):
        return None
    figure = Figure(figsize=(7.4, 4.6))
    panel = figure.subplots()
    for name, one in points.items():
        if one.size:
            panel.plot(*one, markersize=5 if one.shape[1] <= MAX_NUMBERED else 2.5, label=_escape(name))
    for line, (name, points) in zip((":", "--"), FIGURE_1.items() if has_static else (), strict=False):
        x, y = np.array(points).T
        label = f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)"
        panel.plot(UNIT * x, y, color="0.55", marker="x", linestyle=line, label=label)
    what = "ImageNet and its shifts" if has_static else f"mean {task} over all periods"
    panel.set(xscale="log", xlabel="total compute (MACs of the forward passes)", ylabel=f"{what} (%)")
    panel.legend()
    return figure


def draw_robustness(results: Results) -> Figure | None:
    """Draw retrieval on new against old data: a point a model, joined in a run, with a fitted line in a family."""
    task = next(task for task, kind in results.benchmark.tasks.items() if kind == "retrieval")
    spans = old_and_new(results.benchmark)
    series: dict[tuple[bool, str], list[np.ndarray]] = {}
    for one in results.subjects:
        points = 100 * np.stack([mean_over(one, task, periods) for periods in spans.values()], axis=1)
        label = one.name if one.is_run else one.about["family"] or one.name
        series.setdefault((one.is_run, label), []).extend(points[np.isfinite(points).all(axis=1)])
    series = {key: points for key, points in series.items() if points}
    if not series:
        return None
    figure = Figure(figsize=(6.8, 5))
    panel = figure.subplots()
    for ((is_run, name), points), style in zip(series.items(), SERIES(), strict=False):
        x, y = np.array(points).T
        look = {
            "markersize": 5 if len(points) <= MAX_NUMBERED else 2.5,
            "markerfacecolor": style["color"] if is_run else "white",
        }
        panel.plot(x, y, **style | {"linestyle": "none"}, **look, label=_escape(name))
        if not is_run and np.ptp(x) > 0:
            x, y = np.sort(x), np.polyval(np.polyfit(x, y, 1), np.sort(x))
        if is_run or np.ptp(x) > 0:
            panel.plot(x, y, **style | {"marker": "none"}, linewidth=0.9)
    old, *_, new = spans
    panel.set(xlabel=f"{task} on {old} (%)", ylabel=f"{task} on {new} (%)")
    across, up = panel.get_xlim(), panel.get_ylim()
    dashes = {"color": "0.7", "linewidth": 0.9, "dashes": (4, 4), "zorder": 0, "marker": "none"}
    panel.axline((across[0],) * 2, slope=1, **dashes, label="as good on both")
    panel.set(xlim=across, ylim=(min(up[0], across[0]), max(up[1], across[1])))
    figure.legend(loc="outside right upper")
    return figure


def draw_training(results: Results) -> Figure | None:
    """Draw what training logged against the samples seen: a line a run; the steps of one run are marked off."""
    logs = {run.name: read_log(run.folder, run.steps) for run in results.runs}
    logs = {name: steps for name, steps in logs.items() if any(steps)}
    if not logs:
        return None
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(2.2, 1, 1))
    for panel, (key, label) in zip(panels, CURVES.items(), strict=True):
        for name, steps in logs.items():
            lines = [line for step in steps for line in step]
            values = [line.get("contrastive_loss", line[key]) if key == "loss" else line[key] for line in lines]
            panel.plot([line["samples_seen"] for line in lines], values, marker="none", label=_escape(name))
        for step in filter(None, steps if len(logs) == 1 else ()):
            panel.axvline(step[-1]["samples_seen"], color="0.8", linewidth=0.8, zorder=0, marker="none")
        panel.set_ylabel(label)
    panels[-1].set_xlabel("samples seen")
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(logs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
