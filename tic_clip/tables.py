"""From results to tables: the summary of a run, and its numbers as text, Markdown, LaTeX and CSV. Draws nothing."""

import csv
import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tic_clip import TicError
from tic_clip.metrics import MAIN_METRIC, transfer
from tic_clip.results import RESULTS, matrix, read_results, reduce_periods
from tic_clip.storage import to_path
from tic_clip.timeline import Benchmark, get_benchmark

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


def run_names(run_dirs: list) -> list[str]:
    """A name for each run: its folder's, or parent/name where two folders have the same name."""
    paths = [to_path(run_dir).absolute() if "://" not in str(run_dir) else to_path(run_dir) for run_dir in run_dirs]
    short = [path.name for path in paths]
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(short, paths, strict=True)]
    if not names or len(set(names)) < len(names):
        raise TicError(f"runs to compare need different names (folder, or parent/folder), not {', '.join(names)}")
    return names


def read_run(run_dir: object) -> dict:
    """The summary of the run in a folder.

    Raises:
        TicError: it has no results, or none that can be reported.
    """
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
    last = {result["step"]: result for result in results}
    scores = {task: matrix(results, benchmark, task) for task in benchmark.tasks}
    return {
        "benchmark": benchmark.name,
        "method": _only(results, "method"),
        "scale": _only(results, "scale"),
        "steps": [step.name for step in benchmark.steps],
        "tasks": {
            task: _summarize_task(values, benchmark, MAIN_METRIC[benchmark.tasks[task]])
            for task, values in scores.items()
            if not np.isnan(values).all()
        },
        "samples_seen": [last.get(step.name, {}).get("samples_seen") for step in benchmark.steps],
        "macs_seen": [last.get(step.name, {}).get("macs_seen") for step in benchmark.steps],
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


def periods_matrix(task: dict) -> list[list[float | None]]:
    """The (num_steps, num_periods) values of a summary's task."""
    return task.get("periods_matrix", task["matrix"])


def tables(summary: dict) -> list[Table]:
    """One run: the matrix of each task. Several: one table that compares them."""
    if "runs" in summary:
        return [_comparison(summary["runs"])]
    benchmark = get_benchmark(summary["benchmark"])
    return [_matrix_table(summary, benchmark, name) for name in summary["tasks"]]


def _matrix_table(summary: dict, benchmark: Benchmark, name: str) -> Table:
    task = summary["tasks"][name]
    values = periods_matrix(task)
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
    columns = [(task, key) for task in task_names(runs) for key in TRANSFERS]
    figures = [[run["tasks"].get(task, {}).get(key) for task, key in columns] for run in runs.values()]
    cells = [[percent(value) for value in row] for row in figures]
    heads = [[name, run["method"], thousands(total(run, "samples_seen"))] for name, run in runs.items()]
    with_macs = any(total(run, "macs_seen") is not None for run in runs.values())
    if with_macs:
        heads = [[*head, powers(total(run, "macs_seen"))] for head, run in zip(heads, runs.values(), strict=True)]
    names = ["run", "method", "samples\nseen", *["MACs"] * with_macs]
    return Table(
        title=f"{get_benchmark(any_run['benchmark']).title}: {', '.join(metric_notes(runs))}, in per cent",
        header=[*names, *(f"{task}\n{TRANSFERS[key]}" for task, key in columns)],
        rows=[head + row for head, row in zip(heads, cells, strict=True)],
        marked={(i, len(names) + j) for i, j in _best(figures, cells)},
        legend="{mark}: the best of its column" + "; MACs are those of the forward passes" * with_macs,
    )


def task_names(runs: dict[str, dict]) -> list[str]:
    """The tasks that a run was evaluated on, in the benchmark's order."""
    benchmark = get_benchmark(next(iter(runs.values()))["benchmark"])
    return [task for task in benchmark.tasks if any(task in run["tasks"] for run in runs.values())]


def metric_notes(runs: dict[str, dict]) -> list[str]:
    """Which metric each task's numbers are."""
    kinds = get_benchmark(next(iter(runs.values()))["benchmark"]).tasks
    return [f"{task} = {MAIN_METRIC[kinds[task]]}" for task in task_names(runs)]


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


def thousands(count: int | None) -> str:
    """A count with separators."""
    return MISSING if count is None else f"{count:,}"


def powers(count: float | None) -> str:
    """A large count with two digits."""
    return MISSING if count is None else f"{count:.1e}".replace("e+", "e")


def total(run: dict, what: str) -> float | None:
    """The samples, or MACs, that a run has spent up to its last finished step."""
    return max((seen for seen in run.get(what) or [] if seen is not None), default=None)


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
        [cell.rjust(width) if is_number(table, j) else cell.ljust(width) for cell in column]
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


def is_number(table: Table, column: int) -> bool:
    """Whether a column is set flush right."""
    return column > 0 and table.header[column] != "method"


def to_markdown(items: list[Table]) -> str:
    """``items`` as Markdown."""

    def escape(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")

    def write(table: Table) -> str:
        rule = ["---:" if is_number(table, j) else "---" for j in range(len(table.header))]
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

    def plain(cell: str) -> str:
        power = re.fullmatch(r"(\d\.\d)e(\d+)", cell)
        return rf"${power[1]} \times 10^{{{int(power[2])}}}$" if power else escape(cell)

    def write(table: Table) -> str:
        columns = "".join("r" if is_number(table, j) else "l" for j in range(len(table.header)))
        rows = [" & ".join(row) + r" \\" for row in _marked_rows(table, plain, r"\textbf{{{}}}".format)]
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
            for step, row in zip(run["steps"], periods_matrix(task), strict=True):
                cells = ["" if value is None else repr(value) for value in row]
                writer.writerow([run_name] * several + [name, step, *cells])
    return file.getvalue()
