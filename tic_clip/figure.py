"""The step × period matrix as a heat map, and training as curves; readable in grey and for the colour-blind."""

import io
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from tic_clip.metrics import MAIN_METRIC
from tic_clip.tables import MAX_NUMBERED, MISSING, periods_matrix, task_names
from tic_clip.timeline import Benchmark, get_benchmark


def heatmap(runs: dict[str, dict]) -> bytes:
    """A PNG: a heat map for each task and run, all of one task on one colour scale.

    One run: its tasks side by side. Several: the runs side by side, at most four in a row, one block of rows a task.
    """
    benchmark = get_benchmark(next(iter(runs.values()))["benchmark"])
    tasks = task_names(runs)
    lines = math.ceil(len(runs) / 4)
    across, down = (len(tasks), 1) if len(runs) == 1 else (math.ceil(len(runs) / lines), len(tasks) * lines)
    size = 4.8 if len(runs) == 1 else 3.6
    figure = Figure(figsize=(size * across + 0.7, size * down * 0.92 + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(axes, tasks, strict=True):
        _draw_task(figure, row, runs, task, benchmark)
    method = f", {next(iter(runs.values()))['method']}" if len(runs) == 1 else ""
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(f"{benchmark.title}{method}", fontsize=13, fontweight="bold")
    return _to_png(figure)


def _to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Those of Okabe and Ito, which the colour-blind tell apart; ochre for yellow, which is faint on white."""


def curves(logs: dict[str, list[list[dict]]]) -> bytes | None:
    """A PNG of what training logged, against the samples seen: a line a run, and a panel a figure of ``CURVES``.

    ``logs`` has the lines of each step of each run; None where there is no line. One run: its steps are marked off.
    """
    lines = {name: [line for step in steps for line in step] for name, steps in logs.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        return None
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(2.2, 1, 1))
    for panel, (key, label) in zip(panels, CURVES.items(), strict=True):
        for i, (name, found) in enumerate(lines.items()):
            panel.plot(
                [line["samples_seen"] for line in found],
                [line.get("contrastive_loss", line[key]) if key == "loss" else line[key] for line in found],
                linewidth=1.1,
                color=COLOURS[i % len(COLOURS)],
                linestyle=("-", "--", ":", "-.")[i // len(COLOURS) % 4],
                label=name,
            )
        panel.set_ylabel(label, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        for step in next(iter(logs.values())) if len(lines) == 1 else ():
            if step:
                panel.axvline(step[-1]["samples_seen"], color="0.8", linewidth=0.8, zorder=0)
    panels[-1].set_xlabel("samples seen", fontsize=9)
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _to_png(figure)


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
        ax.set_title(task if len(runs) == 1 else f"{task}: {name}", fontsize=10)
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
