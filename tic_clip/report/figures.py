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
from tic_clip.report.frame import Results, Subject
from tic_clip.report.tables import IMAGENET, MAX_NUMBERED, SHIFTS, old_and_new, percent

FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""File types, and what is left out of them so that equal figures are equal bytes."""
CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Those of Okabe and Ito, which the colour-blind tell apart; ochre for yellow, which is faint on white."""
SERIES = cycler(color=COLOURS * 9, marker="osD^vP*Xd" * 8, linestyle=["-", "--", ":", "-."] * 18)
"""72 series, each with a colour and marker of its own."""
STYLE = Path(__file__).with_name("report.mplstyle")
UNIT = 5.0e18
"""MACs of a step of TiC-DataComp-large, C in the paper's figure."""
FIGURE_1 = {
    "from scratch": [(1, 24.7), (3, 34.1), (6, 38.4), (10, 41.3), (15, 42.7), (21, 44.3), (28, 45.3)],
    "warm start + replay": [(1, 24.7), (2, 34.6), (3, 38.2), (4, 40.2), (5.5, 42.0), (7.5, 43.8), (10.5, 45.6)],
}
"""(total compute in C, accuracy in per cent) of Figure 1, right: TiC-DataComp-large, ImageNet and its distribution
shifts; read off the figure, good to about 0.3."""


def draw_figures(results: Results) -> dict[str, bytes]:
    """Return each figure as PNG and as SVG by file name, b"" if it has nothing to show."""
    drawings = {"heatmap": draw_heatmap, "curves": draw_curves, "compute": draw_compute}
    drawings |= {"robustness": draw_robustness, "training": draw_training}
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
    """Return ``name`` as a label: matplotlib sets what is between dollars as a formula and hides a leading _."""
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def _metric_label(results: Results, task: str) -> str:
    return f"{results.benchmark.main_metric(task)} (%)"


def _set_periods(panel: Axes, periods: tuple[str, ...]) -> None:
    stride = math.ceil(len(periods) / MAX_NUMBERED)
    panel.set_xticks(range(0, len(periods), stride), periods[::stride], rotation=45, ha="right", rotation_mode="anchor")
    panel.set_xlabel("evaluated on")


def draw_heatmap(results: Results) -> Figure | None:
    """Draw the matrix of each task and run: of one run, its tasks side by side; of several, four runs in a row."""
    runs, single = results.runs, results.single
    tasks = [task for task in results.tasks if any(task in run.tasks for run in runs)]
    if not tasks:
        return None
    lines = math.ceil(len(runs) / 4)
    across, down = (len(tasks), 1) if single else (math.ceil(len(runs) / lines), len(tasks) * lines)
    figure = Figure(figsize=(4.2 * across + 0.7, 3.8 * down + 0.5))
    panels = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(panels, tasks, strict=True):
        grids = [100 * run.matrix(task).to_numpy() for run in runs]
        limits = {"vmin": np.nanmin(grids), "vmax": np.nanmax(grids)}
        for panel, run, grid in zip(row, runs, grids, strict=False):
            image = panel.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", **limits)
            panel.set_title(task if single else f"{task}: {_escape(run.name)}")
            _finish_matrix(panel, run, grid, image.to_rgba(grid))
        for panel in row[len(runs) :]:
            panel.set_axis_off()
        figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.02, label=_metric_label(results, task))
    figure.suptitle(_escape(results.benchmark.title) + (f", {single.about['method']}" if single else ""), fontsize=13)
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
        colour, size = "white" if is_dark else "black", 8 if grid.shape[1] < 10 else 6.5
        panel.text(j, i, percent(value / 100), ha="center", va="center", fontsize=size, color=colour)


def draw_curves(results: Results) -> Figure | None:
    """Draw the main metric over the periods: of at most eight steps of a single run, else of each last model."""
    if not results.tasks:
        return None
    periods, run = results.benchmark.periods, results.single
    if run:
        lines = {step: (run, step) for step in run.steps[:: math.ceil(len(run.steps) / 8)]}
    else:
        ends = [f" (up to {one.last_step})" if one.last_step != one.steps[-1] else "" for one in results.subjects]
        lines = {one.name + end: (one, one.last_step) for one, end in zip(results.subjects, ends, strict=True)}
    figure = Figure(figsize=(5.2 * len(results.tasks) + 1.6, 3.9))
    panels = figure.subplots(1, len(results.tasks), squeeze=False)[0]
    for panel, task in zip(panels, results.tasks, strict=True):
        size = {} if len(periods) <= MAX_NUMBERED else {"markersize": 0}
        for label, (one, step) in lines.items():
            panel.plot(range(len(periods)), 100 * one.matrix(task).loc[step].to_numpy(), label=_escape(label), **size)
        _set_periods(panel, periods)
        panel.set(ylabel=_metric_label(results, task), title=task)
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
    what, paper = "ImageNet and its shifts", FIGURE_1
    if not any(np.isfinite(values).any() for values in accuracy.values()):
        accuracy = {run.name: run.mean_over(task, [results.benchmark.periods])[:, 0] for run in results.runs}
        what, paper = f"mean {task} over all periods", {}
    macs = {run.name: run.spent["macs_seen"].astype(float) for run in results.runs}
    points = {name: np.stack([macs[name], 100 * values]) for name, values in accuracy.items()}
    points = {name: part[:, np.isfinite(part).all(axis=0)] for name, part in points.items()}
    if not any(part.size for part in points.values()):
        return None
    figure = Figure(figsize=(7.4, 4.6))
    panel = figure.subplots()
    for name, part in points.items():
        if part.size:
            panel.plot(*part, label=_escape(name))
    for line, (name, part) in zip((":", "--"), paper.items(), strict=False):
        x, y = np.array(part).T
        label = f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)"
        panel.plot(UNIT * x, y, color="0.55", marker="x", linestyle=line, label=label)
    panel.set(xscale="log", xlabel="total compute (MACs of the forward passes)", ylabel=f"{what} (%)")
    panel.legend()
    return figure


def draw_robustness(results: Results) -> Figure | None:
    """Draw retrieval on new against old data: a line a run, a point a model, with a fitted line for each family."""
    task = next(task for task, kind in results.benchmark.tasks.items() if kind == "retrieval")
    spans = old_and_new(results.benchmark)
    series: dict[tuple[bool, str], list[np.ndarray]] = {}
    for one in results.subjects:
        points = 100 * one.mean_over(task, spans.values())
        label = one.name if one.is_run else one.about["family"] or one.name
        series.setdefault((one.is_run, label), []).extend(points[np.isfinite(points).all(axis=1)])
    series = {key: np.array(points).T for key, points in series.items() if points}
    if not series:
        return None
    figure = Figure(figsize=(6.8, 5))
    panel = figure.subplots()
    for (is_run, name), (x, y) in series.items():
        look = {} if is_run else {"linestyle": "none", "markerfacecolor": "white"}
        (drawn,) = panel.plot(x, y, label=_escape(name), **look)
        if not is_run and np.ptp(x) > 0:
            fitted = np.polyval(np.polyfit(x, y, 1), np.sort(x))
            panel.plot(np.sort(x), fitted, color=drawn.get_color(), marker="none", linestyle="-")
    old, *_, new = spans
    panel.set(xlabel=f"{task} on {old} (%)", ylabel=f"{task} on {new} (%)")
    low, high = panel.get_xlim()
    panel.axline((low, low), slope=1, color="0.7", linestyle="--", marker="none", zorder=0, label="as good on both")
    panel.set_xlim(low, high)
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
