"""The figures of a report, readable in grey and for the colour-blind."""

import io
import itertools
import math

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from tic_clip.benchmarks import Benchmark
from tic_clip.metrics import MAIN_METRIC
from tic_clip.report.frame import STATIC, Results
from tic_clip.report.tables import IMAGENET, MAX_NUMBERED, MISSING, SHIFTS, mean_over, old_and_new, span

FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""File types, and what is left out of them so that equal figures are equal bytes."""
CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Those of Okabe and Ito, which the colour-blind tell apart; ochre for yellow, which is faint on white."""
MARKERS, LINES = "osD^vP*X", ("-", "--", ":", "-.")
SHIFTED = [(i + i // len(COLOURS)) for i in range(64)]
SERIES = cycler(
    color=COLOURS * 8,
    marker=[MARKERS[i % len(MARKERS)] for i in SHIFTED],
    linestyle=[LINES[i % len(LINES)] for i in SHIFTED],
)
"""64 series, each with a colour, marker and line of its own."""
STYLE = {
    "axes.labelsize": 9,
    "axes.prop_cycle": SERIES,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "svg.hashsalt": "tic-clip",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
UNIT = 5.0e18
"""MACs of a step of TiC-DataComp-large, C in the paper's figure."""
FIGURE_1 = {
    "from scratch": [(1, 24.7), (3, 34.1), (6, 38.4), (10, 41.3), (15, 42.7), (21, 44.3), (28, 45.3)],
    "warm start + replay": [(1, 24.7), (2, 34.6), (3, 38.2), (4, 40.2), (5.5, 42.0), (7.5, 43.8), (10.5, 45.6)],
}
"""(total compute in C, accuracy in per cent) of Figure 1, right: TiC-DataComp-large, ImageNet and its distribution
shifts; read off the figure, good to about 0.3."""


def draw_figures(results: Results, logs: dict[str, list[list[dict]]]) -> dict[str, dict[str, bytes] | None]:
    """Return the PNG and SVG of each figure, None for one that has nothing to show; equal results give equal bytes.

    ``logs`` has the lines that training logged at each step of each run.
    """
    with mpl.rc_context(STYLE):
        figures = {
            "heatmap": draw_heatmap(results),
            "curves": draw_curves(results),
            "compute": draw_compute(results),
            "robustness": draw_robustness(results),
            "training": draw_training(logs),
        }
        return {name: figure and {kind: _save(figure, kind) for kind in FORMATS} for name, figure in figures.items()}


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
    """Draw the matrix of each task and run, all of one task on one colour scale.

    One run: its tasks side by side. Several: the runs side by side, at most four in a row, one block of rows a task.
    """
    tasks, runs = results.tasks_of(results.runs), results.runs
    if not tasks:
        return None
    lines = math.ceil(len(runs) / 4)
    across, down = (len(tasks), 1) if results.single else (math.ceil(len(runs) / lines), len(tasks) * lines)
    size = 4.8 if results.single else 3.6
    figure = Figure(figsize=(size * across + 0.7, size * down * 0.92 + 0.5))
    panels = figure.subplots(down, across, squeeze=False).reshape(len(tasks), -1)
    for row, task in zip(panels, tasks, strict=True):
        grids = [100 * results.matrix(name, task).to_numpy() for name in runs]
        limits = {"vmin": np.nanmin(grids), "vmax": np.nanmax(grids)}
        for panel, name, grid in zip(row, runs, grids, strict=False):
            image = panel.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", **limits)
            panel.set_title(task if results.single else f"{task}: {_escape(name)}")
            _finish_matrix(panel, results.benchmark, grid, image.to_rgba(grid))
        for panel in row[len(runs) :]:
            panel.set_axis_off()
        bar = figure.colorbar(image, ax=list(row), shrink=0.85, pad=0.02)
        bar.set_label(f"{MAIN_METRIC[results.benchmark.tasks[task]]} (%)")
        bar.outline.set_visible(False)
    method = f", {results.about(results.single)['method']}" if results.single else ""
    figure.suptitle(_escape(f"{results.benchmark.title}{method}"), fontsize=13, fontweight="bold")
    return figure


def _finish_matrix(panel: Axes, benchmark: Benchmark, grid: np.ndarray, colours: np.ndarray) -> None:
    """Label a matrix, outline each step's own periods and write the numbers, dark on light and light on dark."""
    _set_periods(panel, benchmark.periods)
    if panel.get_subplotspec().is_first_col():
        stride = math.ceil(len(benchmark.steps) / MAX_NUMBERED)
        steps = range(0, len(benchmark.steps), stride)
        panel.set_yticks(steps, [benchmark.steps[i].name for i in steps])
        panel.set_ylabel("trained up to")
    else:
        panel.set_yticks([])
    panel.tick_params(length=0)
    panel.set_facecolor("0.88")  # shows through where a result is missing
    panel.spines[:].set_visible(False)
    numbered, start = grid.shape[1] <= MAX_NUMBERED, -0.5
    for i, step in enumerate(benchmark.steps):
        outline = Rectangle((start, i - 0.5), len(step.periods), 1, fill=False, clip_on=False)
        outline.set_linewidth(1.6 if numbered else 0.6)
        panel.add_patch(outline)
        start += len(step.periods)
    for (i, j), value in np.ndenumerate(grid) if numbered else ():
        is_dark = np.isfinite(value) and colours[i, j, :3] @ (0.299, 0.587, 0.114) < 0.5
        text, colour = MISSING if np.isnan(value) else f"{value:.1f}", "white" if is_dark else "black"
        panel.text(j, i, text, ha="center", va="center", fontsize=8 if grid.shape[1] < 10 else 6.5, color=colour)


def draw_curves(results: Results) -> Figure | None:
    """Draw the main metric over the periods: of at most eight steps of a single run, else of each run's last step and
    of each model.
    """
    if not results.tasks:
        return None
    periods, single = results.benchmark.periods, results.single
    figure = Figure(figsize=(5.2 * len(results.tasks) + 1.6, 3.9))
    panels = figure.subplots(1, len(results.tasks), squeeze=False)[0]
    for panel, task in zip(panels, results.tasks, strict=True):
        if single:
            rows = results.matrix(single, task)
            lines = {step: rows.loc[step] for step in rows.index[:: math.ceil(len(rows) / 8)]}
        else:
            names = [name for name in results.names if results.tasks_of([name]).count(task)]
            rows = {name: results.matrix(name, task).loc[results.last_step(name)] for name in names}
            lines = {_name_last(results, name): row for name, row in rows.items()}
        for label, values in lines.items():
            size = {} if len(periods) <= MAX_NUMBERED else {"markersize": 0}
            panel.plot(range(len(periods)), 100 * values.to_numpy(), label=_escape(label), **size)
        _set_periods(panel, periods)
        panel.set(ylabel=f"{MAIN_METRIC[results.benchmark.tasks[task]]} (%)", title=task)
        panel.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="trained up to" if single else None)
    return figure


def _name_last(results: Results, name: str) -> str:
    """Return the name of a run or model, with its last step if it is not the benchmark's."""
    last = results.last_step(name)
    return name if last == results.steps(name)[-1] else f"{name} (up to {last})"


def draw_compute(results: Results) -> Figure | None:
    """Draw accuracy against total compute: a line a run, a point a step.

    Accuracy is the mean of ImageNet and its shifts where a run has them, beside the paper's points; else the mean of
    the first task over all periods.
    """
    accuracy = {name: _mean_shifts(results, name) for name in results.runs}
    has_static = any(np.isfinite(values).any() for values in accuracy.values())
    if not has_static and results.tasks:
        task, periods = results.tasks[0], results.benchmark.periods
        accuracy = {name: mean_over(results, name, task, periods) for name in results.runs}
    points = {name: (results.spent(name, "macs_seen").to_numpy(dtype=float), 100 * accuracy[name]) for name in accuracy}
    known = {name: np.isfinite(x) & np.isfinite(y) for name, (x, y) in points.items()}
    if not any(one.any() for one in known.values()):
        return None
    figure = Figure(figsize=(7.4, 4.6))
    panel = figure.subplots()
    for name, (x, y) in points.items():
        if known[name].any():
            size = 5 if known[name].sum() <= MAX_NUMBERED else 2.5
            panel.plot(x[known[name]], y[known[name]], markersize=size, label=_escape(name))
    for line, (name, paper) in zip((":", "--"), FIGURE_1.items() if has_static else (), strict=False):
        x, y = np.array(paper).T
        label = f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)"
        panel.plot(UNIT * x, y, color="0.55", marker="x", linestyle=line, label=label)
    what = "ImageNet and its shifts" if has_static else f"mean {results.tasks[0]} over all periods"
    panel.set(xscale="log", xlabel="total compute (MACs of the forward passes)", ylabel=f"{what} (%)")
    panel.legend()
    return figure


def _mean_shifts(results: Results, name: str) -> np.ndarray:
    """Return the mean of ImageNet and its shifts of each step, NaN if one is missing."""
    return results.matrix(name, STATIC).reindex(columns=[IMAGENET, *SHIFTS]).mean(axis=1, skipna=False).to_numpy()


def draw_robustness(results: Results) -> Figure | None:
    """Draw retrieval on new data against retrieval on old data: a point a model; y = x is dashed.

    The steps of a run are joined in their order; a family of models has a fitted line.
    """
    task = next(task for task, kind in results.benchmark.tasks.items() if kind == "retrieval")
    periods = old_and_new(results.benchmark)
    groups: dict[tuple[bool, str], list[np.ndarray]] = {}
    for name in results.names:
        points = 100 * np.stack([mean_over(results, name, task, part) for part in periods], axis=1)
        label = name if name in results.runs else results.about(name)["family"] or name
        groups.setdefault((name in results.runs, label), []).append(points[np.isfinite(points).all(axis=1)])
    series = {key: np.concatenate(parts) for key, parts in groups.items()}
    series = {key: points for key, points in series.items() if len(points)}
    if not series:
        return None
    figure = Figure(figsize=(6.8, 5))
    panel = figure.subplots()
    for ((is_run, name), points), style in zip(series.items(), itertools.cycle(SERIES), strict=False):
        x, y = points.T
        size = 5 if len(points) <= MAX_NUMBERED else 2.5
        look = {"markersize": size, "markerfacecolor": style["color"] if is_run else "white"}
        panel.plot(x, y, **style | {"linestyle": "none"}, **look, label=_escape(name))
        if not is_run and np.ptp(x) > 0:
            x, y = np.sort(x), np.polyval(np.polyfit(x, y, 1), np.sort(x))
        if is_run or np.ptp(x) > 0:
            panel.plot(x, y, **style | {"marker": "none"}, linewidth=0.9)
    old, new = map(span, periods)
    panel.set(xlabel=f"{task} on {old} (%)", ylabel=f"{task} on {new} (%)")
    across, up = panel.get_xlim(), panel.get_ylim()
    dashes = {"color": "0.7", "linewidth": 0.9, "dashes": (4, 4), "zorder": 0, "marker": "none"}
    panel.axline((across[0],) * 2, slope=1, **dashes, label="as good on both")
    panel.set(xlim=across, ylim=(min(up[0], across[0]), max(up[1], across[1])))
    figure.legend(loc="outside right upper")
    return figure


def draw_training(logs: dict[str, list[list[dict]]]) -> Figure | None:
    """Draw what training logged against the samples seen: a line a run; the steps of one run are marked off."""
    lines = {name: [line for step in steps for line in step] for name, steps in logs.items() if any(steps)}
    if not lines:
        return None
    figure = Figure(figsize=(10, 6.4))
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(2.2, 1, 1))
    for panel, (key, label) in zip(panels, CURVES.items(), strict=True):
        for name, found in lines.items():
            values = [line.get("contrastive_loss", line[key]) if key == "loss" else line[key] for line in found]
            panel.plot([line["samples_seen"] for line in found], values, marker="none", label=_escape(name))
        for step in next(iter(logs.values())) if len(lines) == 1 else ():
            if step:
                panel.axvline(step[-1]["samples_seen"], color="0.8", linewidth=0.8, zorder=0, marker="none")
        panel.set_ylabel(label)
    panels[-1].set_xlabel("samples seen")
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
