"""Tables, a figure and one self-contained HTML page from the results of one run, or of several to compare.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison

Reads ``R/eval_results.jsonl`` and ``R/{step}/train.log.jsonl`` of each run R. Writes summary.json, matrix.csv,
table.md, table.tex, heatmap.png, training.png (where there are logs) and report.html. Equal results and logs give equal
bytes.
"""

from tic_clip import TicError
from tic_clip.figure import curves, heatmap
from tic_clip.page import to_html
from tic_clip.results import read_log
from tic_clip.storage import atomic_open, remove, to_path, write_json, write_text
from tic_clip.tables import read_run, run_names, tables, to_csv, to_latex, to_markdown


def report(run_dirs: list, output_dir: object) -> dict:
    """Write every table and figure on ``run_dirs`` into ``output_dir``.

    Returns:
        The content of summary.json: that of the one run, or ``{"runs": {name: summary}}``.

    Raises:
        TicError: a run has no results that can be reported, or two runs are of different benchmarks.
    """
    names = run_names(run_dirs)
    runs = {name: read_run(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}
    benchmarks = sorted({run["benchmark"] for run in runs.values()})
    if len(benchmarks) > 1:
        raise TicError(f"cannot compare runs of different benchmarks: {', '.join(benchmarks)}")
    summary = next(iter(runs.values())) if len(runs) == 1 else {"runs": runs}
    logs = {name: read_log(run_dir, runs[name]["steps"]) for name, run_dir in zip(names, run_dirs, strict=True)}
    png, training = heatmap(runs), curves(logs)
    output = to_path(output_dir)
    write_json(output / "summary.json", summary)
    write_text(output / "matrix.csv", to_csv(summary))
    write_text(output / "table.md", to_markdown(tables(summary)))
    write_text(output / "table.tex", to_latex(tables(summary)))
    for name, picture in (("heatmap.png", png), ("training.png", training)):
        if picture is None:
            remove(output / name)
            continue
        with atomic_open(output / name) as file:
            file.write(picture)
    write_text(output / "report.html", to_html(runs, tables(summary), png, training))
    return summary
