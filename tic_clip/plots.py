"""Results and training as lines and points; readable in grey and for the colour-blind."""

import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tic_clip.markup import MAX_NUMBERED
from tic_clip.metrics import MAIN_METRIC
from tic_clip.paper import FIGURE_1, IMAGENET, SHIFTS, UNIT
from tic_clip.summary import Summaries, last_step, periods_matrix, spread
from tic_clip.tables import mean_over, new_periods, old_periods, span

CURVES = {"loss": "contrastive loss", "lr": "learning rate", "samples_per_second": "samples a second"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f")
"""Those of Okabe and Ito, which the colour-blind tell apart; ochre for yellow, which is faint on white."""
MARKERS, LINES = "osD^vP*X", ("-", "--", ":", "-.")


def styles() -> Iterator[dict[str, str]]:
    """A colour, a marker and a kind of line for each of as many series as there are."""
    for i in itertools.count():
        line, marker = (kinds[(i + i // len(COLOURS)) % len(kinds)] for kinds in (LINES, MARKERS))
        yield {"color": COLOURS[i % len(COLOURS)], "marker": marker, "linestyle": line}


def shown(name: str) -> str:
    """``name`` as a label: matplotlib sets what stands between dollars as a formula, and hides what begins with _."""
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def _plain(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def training(logs: dict[str, list[list[dict]]]) -> Figure | None:
    """What training logged, against the samples seen: a line a run, and a panel a figure of ``CURVES``.

    ``logs`` has the lines of each step of each run; None where there is no line. One run: its steps are marked off.
    """
    lines = {name: [line for step in steps for line in step] for name, steps in logs.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        return None
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(2.2, 1, 1))
    for panel, (key, label) in zip(panels, CURVES.items(), strict=True):
        for style, (name, found) in zip(styles(), lines.items(), strict=False):
            panel.plot(
                [line["samples_seen"] for line in found],
                [line.get("contrastive_loss", line[key]) if key == "loss" else line[key] for line in found],
                **{**style, "marker": None},
                linewidth=1.1,
                label=shown(name),
            )
        _plain(panel, "", label)
        for step in next(iter(logs.values())) if len(lines) == 1 else ():
            if step:
                panel.axvline(step[-1]["samples_seen"], color="0.8", linewidth=0.8, zorder=0)
    panels[-1].set_xlabel("samples seen", fontsize=9)
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def over_time(found: Summaries) -> Figure | None:
    """The main metric over the periods: of each step's model of a single run (seven of them at most), else of the last
    model of each run and of each model.
    """
    if not found.tasks:
        return None
    periods = found.benchmark.periods
    figure = Figure(figsize=(5.2 * len(found.tasks) + 1.6, 3.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(found.tasks), squeeze=False)[0]
    for panel, task in zip(panels, found.tasks, strict=True):
        for style, (name, values) in zip(styles(), _lines(found, task), strict=False):
            size = 4 if len(periods) <= MAX_NUMBERED else 0
            panel.plot(range(len(periods)), values, **style, markersize=size, linewidth=1.2, label=shown(name))
        stride = -(-len(periods) // MAX_NUMBERED)
        panel.set_xticks(range(0, len(periods), stride), periods[::stride], rotation=45, ha="right")
        _plain(panel, "evaluated on", f"{MAIN_METRIC[found.benchmark.tasks[task]]} (%)")
        panel.set_title(task, fontsize=10)
        panel.set_ylim(bottom=0)
    title = "trained up to" if found.single else None
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, title=title, title_fontsize=8)
    return figure


def _lines(found: Summaries, task: str) -> Iterator[tuple[str, np.ndarray]]:
    """(label, the values in per cent over the periods) of each line of ``over_time``."""
    if found.single:
        run = found.single
        rows = [(step, row) for step, row in zip(run["steps"], periods_matrix(run["tasks"][task]), strict=True)]
        yield from ((step, _percent(row)) for step, row in rows[:: -(-len(rows) // 8)])
        return
    for name, one in found.everything.items():
        summary = one["tasks"].get(task)
        if summary and "periods" in summary:
            yield name, _percent(summary["periods"].values())
        elif summary:
            last = last_step(one)
            step = "" if last == len(one["steps"]) - 1 else f" (up to {one['steps'][last]})"
            yield f"{name}{step}", _percent(periods_matrix(summary)[last])


def _percent(values: object) -> np.ndarray:
    return 100 * np.array(list(values), dtype=float)


def compute(found: Summaries) -> Figure | None:
    """Accuracy against total compute: a line a run, a point a step.

    Accuracy is the mean of ImageNet and its shifts where a run has them, beside the paper's points; else the mean of
    the first task's main metric over all periods. None where no run has counted its MACs.
    """
    static = any(value is not None for run in found.runs.values() for value in _with_shifts(run))
    series = {name: _against_compute(run, found, static) for name, run in found.runs.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    figure = Figure(figsize=(7.4, 4.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    for style, (name, points) in zip(styles(), series.items(), strict=False):
        panel.plot(*zip(*points, strict=True), **style, markersize=_size(points), linewidth=1.2, label=shown(name))
    for line, (name, points) in zip((":", "--"), FIGURE_1.items() if static else (), strict=False):
        x, y = zip(*points, strict=True)
        text = f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)"
        panel.plot(UNIT * np.array(x), y, color="0.55", marker="x", linestyle=line, linewidth=1.2, label=text)
    what = "ImageNet and its shifts" if static else f"mean {found.tasks[0]} over all periods"
    panel.set_xscale("log")
    _plain(panel, "total compute (MACs of the forward passes)", f"{what} (%)")
    panel.legend(fontsize=8, frameon=False)
    return figure


def _size(points: list) -> float:
    """Of a marker: small where there are many."""
    return 5 if len(points) <= MAX_NUMBERED else 2.5


def _with_shifts(run: dict) -> list[float | None]:
    """The mean of ImageNet and its shifts of each step, None where one is missing."""
    columns = [run.get("static", {}).get(key, [None] * len(run["steps"])) for key in (IMAGENET, *SHIFTS)]
    return [spread(values)[0] for values in zip(*columns, strict=True)]


def _against_compute(run: dict, found: Summaries, static: bool) -> list[tuple[float, float]]:
    """(MACs, per cent) of each step that has both."""
    task = run["tasks"].get(found.tasks[0]) if found.tasks else None
    rows = periods_matrix(task) if task else [[None]] * len(run["steps"])
    values = _with_shifts(run) if static else [spread(row)[0] for row in rows]
    pairs = zip(run.get("macs_seen") or [], values, strict=False)
    return [(macs, 100 * value) for macs, value in pairs if macs is not None and value is not None]


def robustness(found: Summaries) -> Figure | None:
    """Retrieval on new data against retrieval on old data: a point a model; y = x is dashed.

    A family of models, those of one kind of weights, has a fitted line; the steps of a run are joined in their order.
    None where no model has both.
    """
    runs, families = _steps(found), _families(found)
    if not runs and not families:
        return None
    figure = Figure(figsize=(6.8, 5), dpi=150, layout="constrained")
    panel = figure.subplots()
    series = [(name, points, True) for name, points in runs.items()]
    series += [(name, points, False) for name, points in families.items()]
    for style, (name, points, joined) in zip(styles(), series, strict=False):
        x, y = np.array(points).T
        mark = {"marker": style["marker"], "markersize": _size(points), "markerfacecolor": None if joined else "white"}
        panel.plot(x, y, color=style["color"], **mark, linestyle="none", label=shown(name))
        if not joined and np.ptp(x) > 0:
            x, y = np.sort(x), np.polyval(np.polyfit(x, y, 1), np.sort(x))
        if joined or np.ptp(x) > 0:
            panel.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=0.9)
    task = _retrieval(found)
    old, new = span(old_periods(found.benchmark)), span(new_periods(found.benchmark))
    _plain(panel, f"{task} on {old} (%)", f"{task} on {new} (%)")
    across, up = panel.get_xlim(), panel.get_ylim()
    panel.axline(
        (across[0],) * 2, slope=1, color="0.7", linewidth=0.9, dashes=(4, 4), zorder=0, label="as good on both"
    )
    panel.set(xlim=across, ylim=(min(up[0], across[0]), max(up[1], across[1])))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _retrieval(found: Summaries) -> str:
    return next(task for task, kind in found.benchmark.tasks.items() if kind == "retrieval")


Pairs = dict[str, list[tuple[float, float]]]
"""Name -> (old, new) in per cent of each model that has both."""


def _steps(found: Summaries) -> Pairs:
    """The steps of each run."""
    task, pairs = _retrieval(found), {}
    for name, run in found.runs.items():
        rows = periods_matrix(run["tasks"][task]) if task in run["tasks"] else []
        steps = [dict(zip(found.benchmark.periods, row, strict=True)) for row in rows]
        pairs[name] = [_old_and_new({"tasks": {task: {"periods": periods}}}, found) for periods in steps]
    return _known(pairs)


def _families(found: Summaries) -> Pairs:
    """The models that are no run, by family."""
    pairs = {}
    for name, model in found.models.items():
        pairs.setdefault(model["family"] or name, []).append(_old_and_new(model, found))
    return _known(pairs)


def _old_and_new(model: dict, found: Summaries) -> tuple[float | None, float | None]:
    spans = old_periods(found.benchmark), new_periods(found.benchmark)
    return tuple(mean_over(model, _retrieval(found), periods) for periods in spans)


def _known(pairs: dict[str, list[tuple]]) -> Pairs:
    whole = {name: [(100 * x, 100 * y) for x, y in each if None not in (x, y)] for name, each in pairs.items()}
    return {name: each for name, each in whole.items() if each}
