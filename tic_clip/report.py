"""Tables, a figure and one self-contained HTML page from the results of one run, or of several to compare.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison

Reads ``R/eval_results.jsonl`` of each run R. Writes summary.json, matrix.csv, table.md, table.tex, heatmap.png and
report.html. Everything is drawn from the summary, so equal results give equal bytes.
"""

import base64
import csv
import html
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from tic_clip import TicError
from tic_clip.metrics import transfer
from tic_clip.results import RESULTS, matrix, read_results, reduce_periods
from tic_clip.storage import atomic_open, to_path, write_json, write_text
from tic_clip.timeline import Benchmark, get_benchmark

METRICS = {"retrieval": "mean_recall@1", "classification": "acc1"}
"""What ``main_metric`` is for each kind of task."""

TRANSFERS = {"id": "ID", "backward": "backward", "forward": "forward"}
MISSING = "–"
MAX_NUMBERED = 15
"""With more columns than this, a matrix is drawn without numbers and left out of the terminal."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text. ``marked`` cells (row, column) stand out; ``legend`` says what that and the numbers mean."""

    title: str
    header: list[str]
    rows: list[list[str]]
    marked: set[tuple[int, int]]
    legend: str
    wide: bool = False


def report(run_dirs: list, output_dir: object) -> dict:
    """Write every table and figure on ``run_dirs`` into ``output_dir``.

    Returns:
        The content of summary.json: that of the one run, or ``{"runs": {name: summary}}``.

    Raises:
        TicError: a run has no results that can be reported, or two runs are of different benchmarks.
    """
    names = run_names(run_dirs)
    runs = {name: _read_run(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}
    benchmarks = sorted({run["benchmark"] for run in runs.values()})
    if len(benchmarks) > 1:
        raise TicError(f"cannot compare runs of different benchmarks: {', '.join(benchmarks)}")
    summary = next(iter(runs.values())) if len(runs) == 1 else {"runs": runs}
    png = heatmap(runs)
    output = to_path(output_dir)
    write_json(output / "summary.json", summary)
    write_text(output / "matrix.csv", to_csv(summary))
    write_text(output / "table.md", to_markdown(tables(summary)))
    write_text(output / "table.tex", to_latex(tables(summary)))
    with atomic_open(output / "heatmap.png") as file:
        file.write(png)
    write_text(output / "report.html", to_html(runs, tables(summary), png))
    return summary


def run_names(run_dirs: list) -> list[str]:
    """A name for each run: its folder's, or parent/name where two folders have the same name."""
    paths = [to_path(run_dir).absolute() if "://" not in str(run_dir) else to_path(run_dir) for run_dir in run_dirs]
    short = [path.name for path in paths]
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if not names or len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


# ---------------------------------------------------------------------------------------------------- summary


def _read_run(run_dir: object) -> dict:
    path = to_path(run_dir) / RESULTS
    if not path.exists():
        raise TicError(f"{path} is missing: run scripts/evaluate.py first")
    try:
        return summarize(read_results(path))
    except TicError as error:
        raise error if str(path) in str(error) else TicError(f"{path}: {error}") from None


def summarize(results: list[dict]) -> dict:
    """The summary of one run's results. Results that belong to no period (keys not under tic/) are left out.

    Raises:
        TicError: no result is left, one has no step, or they are not of one benchmark, method and scale.
    """
    results = [result for result in results if result["key"].startswith("tic/")]
    if not results:
        raise TicError("no result on a time period: run scripts/evaluate.py first")
    if any(result.get("step") is None for result in results):
        raise TicError("a result has no step: a released model has no step x period matrix")
    benchmark = get_benchmark(_only(results, "benchmark"))
    seen = {result["step"]: result.get("samples_seen") for result in results}
    scores = {task: matrix(results, benchmark, task) for task in benchmark.tasks}
    return {
        "benchmark": benchmark.name,
        "method": _only(results, "method"),
        "scale": _only(results, "scale"),
        "steps": [step.name for step in benchmark.steps],
        "tasks": {
            task: _summarize_task(values, benchmark, METRICS[benchmark.tasks[task]])
            for task, values in scores.items()
            if not np.isnan(values).all()
        },
        "samples_seen": [seen.get(step.name) for step in benchmark.steps],
        "pins": _pins(results),
    }


def _only(results: list[dict], field: str) -> str:
    values = sorted({str(result[field]) for result in results if result.get(field) is not None})
    if len(values) != 1:
        found = f"of several: {', '.join(values)}" if values else "of none"
        raise TicError(f"the results of a run must be of one {field}, these are {found}")
    return values[0]


def _pins(results: list[dict]) -> dict[str, str]:
    """The version of each package; both, where a run was evaluated with two."""
    pins: dict[str, dict[str, None]] = {}
    for result in results:
        for package, version in (result.get("pins") or {}).items():
            pins.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(versions) for package, versions in sorted(pins.items())}


def _summarize_task(values: np.ndarray, benchmark: Benchmark, metric: str) -> dict:
    """``values``: (num_steps, num_periods)."""
    reduced = reduce_periods(values, benchmark)
    task = {"metric": metric, "matrix": _to_json(reduced)}
    task |= {name: None if math.isnan(value) else float(value) for name, value in transfer(reduced).items()}
    if len(benchmark.periods) != len(benchmark.steps):
        task["periods_matrix"] = _to_json(values)
    return task


def _to_json(values: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in values]


def _periods_matrix(task: dict) -> list[list[float | None]]:
    """The (num_steps, num_periods) values of a summary's task."""
    return task.get("periods_matrix", task["matrix"])


# ----------------------------------------------------------------------------------------------------- tables


def tables(summary: dict) -> list[Table]:
    """One run: the matrix of each task. Several: one table that compares them."""
    if "runs" in summary:
        return [_comparison(summary["runs"])]
    benchmark = get_benchmark(summary["benchmark"])
    return [_matrix_table(summary, benchmark, name) for name in summary["tasks"]]


def _matrix_table(summary: dict, benchmark: Benchmark, name: str) -> Table:
    task = summary["tasks"][name]
    values = _periods_matrix(task)
    transfers = ", ".join(f"{label} {percent(task[key])}" for key, label in TRANSFERS.items())
    return Table(
        title=f"{benchmark.title}, {summary['method']}: {name}, {task['metric']} in per cent",
        header=["trained up to", *benchmark.periods],
        rows=[[step, *map(percent, row)] for step, row in zip(summary["steps"], values, strict=True)],
        marked={(i, 1 + j) for i, j in own_periods(benchmark)},
        legend=f"{transfers} ({{mark}}: a step's model on the step's own periods)",
        wide=len(benchmark.periods) > MAX_NUMBERED,
    )


def own_periods(benchmark: Benchmark) -> list[tuple[int, int]]:
    """(step, period) index pairs of each step's own periods: the diagonal of the matrix."""
    owners = [i for i, step in enumerate(benchmark.steps) for _ in step.periods]
    return [(i, j) for j, i in enumerate(owners)]


def _comparison(runs: dict[str, dict]) -> Table:
    """A row a run; the best figure of each column is marked."""
    any_run = next(iter(runs.values()))
    columns = [(task, key) for task in _task_names(runs) for key in TRANSFERS]
    figures = [[run["tasks"].get(task, {}).get(key) for task, key in columns] for run in runs.values()]
    cells = [[percent(value) for value in row] for row in figures]
    heads = [[name, run["method"], _thousands(_total_seen(run))] for name, run in runs.items()]
    return Table(
        title=f"{get_benchmark(any_run['benchmark']).title}: {', '.join(_metric_notes(runs))}, in per cent",
        header=["run", "method", "samples\nseen", *(f"{task}\n{TRANSFERS[key]}" for task, key in columns)],
        rows=[head + row for head, row in zip(heads, cells, strict=True)],
        marked={(i, 3 + j) for i, j in _best(figures, cells)},
        legend="{mark}: the best of its column",
    )


def _task_names(runs: dict[str, dict]) -> list[str]:
    """The tasks that a run was evaluated on, in the benchmark's order."""
    benchmark = get_benchmark(next(iter(runs.values()))["benchmark"])
    return [task for task in benchmark.tasks if any(task in run["tasks"] for run in runs.values())]


def _metric_notes(runs: dict[str, dict]) -> list[str]:
    kinds = get_benchmark(next(iter(runs.values()))["benchmark"]).tasks
    return [f"{task} = {METRICS[kinds[task]]}" for task in _task_names(runs)]


def _best(figures: list[list[float | None]], cells: list[list[str]]) -> set[tuple[int, int]]:
    """Where the largest figure of each column stands; figures that read the same as it are as good."""
    best = set()
    for j, column in enumerate(zip(*figures, strict=True)):
        shown = [(value, i) for i, value in enumerate(column) if value is not None]
        best |= {(i, j) for _, i in shown if cells[i][j] == cells[max(shown)[1]][j]}
    return best


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f}"


def _thousands(count: int | None) -> str:
    return MISSING if count is None else f"{count:,}"


def _total_seen(run: dict) -> int | None:
    return max((seen for seen in run["samples_seen"] if seen is not None), default=None)


def table_text(summary: dict) -> str:
    """The tables of ``summary`` as aligned text for a terminal."""
    return "\n\n".join(_table_text(table) for table in tables(summary))


def _table_text(table: Table) -> str:
    legend = table.legend.format(mark="*")
    if table.wide:
        return f"{table.title}\n(the matrix has {len(table.header) - 1} columns: see matrix.csv)\n{legend}"
    heads = [head.split("\n") for head in table.header]
    depth = max(map(len, heads))
    head_rows = [[f"{'' if k >= len(head) else head[k]} " for head in heads] for k in range(depth)]
    cells = [*head_rows, *_marked_rows(table, "{} ".format, lambda cell: f"{cell.strip()}*")]
    columns = [
        [cell.rjust(width) if _is_number(table, j) else cell.ljust(width) for cell in column]
        for j, column in enumerate(zip(*cells, strict=True))
        for width in [max(map(len, column))]
    ]
    lines = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, "", *lines, "", legend])


def _marked_rows(table: Table, plain: Callable[[str], str], mark: Callable[[str], str]) -> list[list[str]]:
    """The rows of ``table``, each cell as ``plain`` writes it, marked ones then passed through ``mark``."""
    return [
        [mark(plain(cell)) if (i, j) in table.marked else plain(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]


def _is_number(table: Table, column: int) -> bool:
    """Whether a column is set flush right."""
    return column > 0 and table.header[column] != "method"


def to_markdown(items: list[Table]) -> str:
    """``items`` as Markdown."""

    def escape(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")

    def write(table: Table) -> str:
        rule = ["---:" if _is_number(table, j) else "---" for j in range(len(table.header))]
        rows = [[escape(head) for head in table.header], rule, *_marked_rows(table, escape, "**{}**".format)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([f"**{escape(table.title)}**", "", *lines, "", escape(table.legend.format(mark="bold")), ""])

    return "\n".join(map(write, items))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--"}
)


def to_latex(items: list[Table]) -> str:
    """``items`` as LaTeX tables that need no package."""

    def escape(text: str) -> str:
        return text.translate(_LATEX).replace("\n", " ")

    def write(table: Table) -> str:
        columns = "".join("r" if _is_number(table, j) else "l" for j in range(len(table.header)))
        rows = [" & ".join(row) + r" \\" for row in _marked_rows(table, escape, r"\textbf{{{}}}".format)]
        head = " & ".join(map(escape, table.header)) + r" \\"
        caption = escape(f"{table.title}; {table.legend.format(mark='bold')}.")
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}", r"\end{table}", ""]
        return "\n".join(lines)

    return "\n".join(map(write, items))


def to_csv(summary: dict) -> str:
    """Every cell of every task in full precision; empty where there is no result."""
    several = "runs" in summary
    runs = summary["runs"] if several else {"": summary}
    periods = get_benchmark(next(iter(runs.values()))["benchmark"]).periods
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run"] * several + ["task", "step", *periods])
    for run_name, run in runs.items():
        for name, task in run["tasks"].items():
            for step, row in zip(run["steps"], _periods_matrix(task), strict=True):
                cells = ["" if value is None else repr(value) for value in row]
                writer.writerow([run_name] * several + [name, step, *cells])
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------- figure


def heatmap(runs: dict[str, dict]) -> bytes:
    """A PNG: a heat map for each task and run, all of one task on one colour scale.

    One run: its tasks side by side. Several: the runs side by side, at most four in a row, one block of rows a task.
    """
    benchmark = get_benchmark(next(iter(runs.values()))["benchmark"])
    tasks = _task_names(runs)
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
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw_task(figure: Figure, axes: np.ndarray, runs: dict[str, dict], task: str, benchmark: Benchmark) -> None:
    """Draw ``task`` of each run into ``axes`` (at least as many as runs), with one colour bar."""
    missing = [[None] * len(benchmark.periods)] * len(benchmark.steps)
    grids = [
        100 * np.array(_periods_matrix(run["tasks"].get(task, {"matrix": missing})), dtype=float)
        for run in runs.values()
    ]
    scale = {"vmin": np.nanmin(grids), "vmax": np.nanmax(grids), "cmap": "cividis"}
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    for ax, name, grid in zip(axes, runs, grids, strict=False):
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", **scale)
        ax.set_title(task if len(runs) == 1 else f"{task}: {name}", fontsize=10)
        _draw_axes(ax, benchmark)
        if grid.shape[1] <= MAX_NUMBERED:
            _draw_numbers(ax, image, grid, size=8 if len(runs) == 1 else 6.5)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.02)
    bar.set_label(f"{METRICS[benchmark.tasks[task]]} (%)", fontsize=8)
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


# ------------------------------------------------------------------------------------------------------- page

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; color: #1d2129; background: #fff;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #dfe3e8; }}
p, dl {{ max-width: 42rem; }}
.sub, .legend, caption {{ color: #59616d; }}
.legend {{ font-size: .9rem; }}
.scroll {{ overflow: auto; margin: 1rem 0; }}
div.scroll:has(table) {{ max-height: 40rem; }}
img {{ display: block; width: 100%; min-width: {min_width}rem; height: auto; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .5rem; }}
th {{ white-space: pre; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #eceff2; }}
thead th {{ border-bottom: 2px solid #1d2129; vertical-align: bottom; }}
.text {{ text-align: left; }}
td {{ white-space: nowrap; }}
td.mark {{ font-weight: 700; background: #eef3fb; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: #fff; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .6rem; overflow-wrap: anywhere; }}
.run {{ display: grid; grid-template-columns: 9rem 1fr; }}
.run dd {{ margin: 0; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="sub">{subtitle}</p>
<h2>Results</h2>
<div class="scroll"><img alt="Heat map of the step by period matrix; its numbers are in the files beside this page"
 src="data:image/png;base64,{png}"></div>
{tables}
<h2>How to read this</h2>
<p>A model is trained on one time step after another. Each row of a matrix is the model after one step, each column
held-out data of one period, and the outlined cells are a step's model on that step's own period. Each cell is
the share that the model got right, in per cent.</p>
<dl>
<dt>ID (in-domain)</dt><dd>The mean of the diagonal: how well models do on the time they were just trained on.</dd>
<dt>Backward transfer</dt><dd>The mean below the diagonal: how well models do on the past. It is low where a method
forgets.</dd>
<dt>Forward transfer</dt><dd>The mean above the diagonal: how well models do on a future that they have not seen.</dd>
</dl>
<p>Where a step has several periods, their mean counts. {missing} stands where a result is missing, and for each figure
that would need it.</p>
<h2>What was run</h2>
{runs}
</body>
</html>
"""


def to_html(runs: dict[str, dict], items: list[Table], png: bytes) -> str:
    """One page with everything in it: no script, no font, nothing to load."""
    first = next(iter(runs.values()))
    subject = first["method"] if len(runs) == 1 else f"{len(runs)} runs compared"
    return _PAGE.format(
        title=html.escape(f"{get_benchmark(first['benchmark']).title}: {subject}"),
        subtitle=html.escape("; ".join(_metric_notes(runs))),
        min_width=40 if len(runs) <= 2 else 56,
        png=base64.b64encode(png).decode(),
        tables="\n".join(map(_html_table, items)),
        missing=MISSING,
        runs="\n".join(_html_run(name, run) for name, run in runs.items()),
    )


def _html_table(table: Table) -> str:
    def cell(tag: str, j: int, text: str, mark: bool = False) -> str:
        names = " ".join(["text"] * (not _is_number(table, j)) + ["mark"] * mark)
        return f'<{tag} class="{names}">{html.escape(text)}</{tag}>' if names else f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", j, text) for j, text in enumerate(table.header))
    rows = [
        "<tr>" + "".join(cell("td", j, text, (i, j) in table.marked) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(table.rows)
    ]
    return "\n".join(
        [
            f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>',
            f"<thead><tr>{head}</tr></thead>",
            f"<tbody>{''.join(rows)}</tbody></table></div>",
            f'<p class="legend">{html.escape(table.legend.format(mark="bold"))}</p>',
        ]
    )


def _html_run(name: str, run: dict) -> str:
    done = sum(seen is not None for seen in run["samples_seen"])
    facts = {
        "Method": run["method"],
        "Scale": run["scale"],
        "Samples seen": f"{_thousands(_total_seen(run))}, after {done} of {len(run['steps'])} steps",
        "Versions": ", ".join(f"{package} {version}" for package, version in run["pins"].items()) or MISSING,
    }
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f'<h3>{html.escape(name)}</h3>\n<dl class="run">{items}</dl>'
