"""The step x period matrix as a heat map, readable in grey and for the colour-blind; and figures as files."""

import io
import math

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from tic_clip.benchmarks import Benchmark
from tic_clip.markup import MAX_NUMBERED, MISSING
from tic_clip.metrics import MAIN_METRIC
from tic_clip.summary import Summaries, periods_matrix

FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""File types, and what is left out of them so that equal figures are equal bytes."""


def to_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file of a kind of ``FORMATS``; equal figures give equal bytes."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "tic-clip"}):
        figure.savefig(file, format=kind, metadata=FORMATS[kind])
    return file.getvalue()


def heatmap(found: Summaries) -> Figure | None:
    """A heat map for each task and run, all of one task on one colour scale; None without a run.

    One run: its tasks side by side. Several: the runs side by side, at most four in a row, one block of rows a task.
    """
    tasks = [task for task in found.tasks if any(task in run["tasks"] for run in found.runs.values())]
    if not tasks:
        return None
    lines = math.ceil(len(found.runs) / 4)
    one = len(found.runs) == 1
    across, down = (len(tasks), 1) if one else (math.ceil(len(found.runs) / lines), len(tasks) * lines)
    size = 4.8 if one else 3.6
    figure = Figure(figsize=(size * across + 0.7, size * down * 0.92 + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(axes, tasks, strict=True):
        _draw_task(figure, row, found.runs, task, found.benchmark)
    method = f", {next(iter(found.runs.values()))['method']}" if one else ""
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(f"{found.benchmark.title}{method}", fontsize=13, fontweight="bold", parse_math=False)
    return figure


def _draw_task(figure: Figure, axes: np.ndarray, runs: dict[str, dict], task: str, benchmark: Benchmark) -> None:
    """Draw ``task`` of each run into ``axes`` (at least as many as runs), with one colour bar."""
    missing = [[None] * len(benchmark.periods)] * len(benchmark.steps)
    grids = [
        100 * np.array(periods_matrix(run["tasks"].get(task, {"matrix": missing})), dtype=float)
        for run in runs.values()
    ]
    scale = {"vmin": np.nanmin(grids), "vmax": np.nanmax(grids), "cmap": "cividis"}
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    for ax, name, grid in zip(axes, runs, grids, strict=False):
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", **scale)
        ax.set_title(task if len(runs) == 1 else f"{task}: {name}", fontsize=10, parse_math=False)
        _draw_axes(ax, benchmark)
        if len(runs) > 1 and not ax.get_subplotspec().is_first_col():  # the labels stand at the left of the row
            ax.set_yticks([])
            ax.set_ylabel("")
        if grid.shape[1] <= MAX_NUMBERED:
            _draw_numbers(ax, image, grid, size=8 if len(runs) == 1 or grid.shape[1] < 10 else 6.5)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.02)
    bar.set_label(f"{MAIN_METRIC[benchmark.tasks[task]]} (%)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _draw_axes(ax: Axes, benchmark: Benchmark) -> None:
    """Labels, at most about fifteen on an axis, and an outline around each step's own periods."""
    for axis, names in ((ax.xaxis, benchmark.periods), (ax.yaxis, [step.name for step in benchmark.steps])):
        stride = math.ceil(len(names) / MAX_NUMBERED)
        axis.set_ticks(range(0, len(names), stride), names[::stride])
    ax.tick_params(labelsize=7, length=0)
    ax.tick_params(axis="x", rotation=45)
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    ax.set_xlabel("evaluated on", fontsize=8)
    ax.set_ylabel("trained up to", fontsize=8)
    ax.set_facecolor("0.88")  # shows through where a result is missing
    ax.spines[:].set_visible(False)
    start = 0
    width = 1.6 if len(benchmark.periods) <= MAX_NUMBERED else 0.6
    for i, step in enumerate(benchmark.steps):
        corner = (start - 0.5, i - 0.5)
        ax.add_patch(Rectangle(corner, len(step.periods), 1, fill=False, linewidth=width, clip_on=False))
        start += len(step.periods)


def _draw_numbers(ax: Axes, image: AxesImage, grid: np.ndarray, size: float) -> None:
    """Write each cell's value in it, dark on light and light on dark."""
    for (i, j), value in np.ndenumerate(grid):
        dark = np.isfinite(value) and np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) < 0.5
        text = MISSING if np.isnan(value) else f"{value:.1f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
