"""Tables, figures and one self-contained HTML page from the results of runs and of models.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison

Reads ``R/eval_results.jsonl`` and, of runs, ``R/{step}/train.log.jsonl`` of each folder R. Writes summary.json,
matrix.csv, table.csv, table.md, table.tex, report.html, and of each figure of ``FIGURES`` that has something to show a
PNG and an SVG. Equal results and logs give equal bytes.
"""

from tic_clip.evaluation.results import read_log
from tic_clip.figure import FORMATS, heatmap, to_bytes
from tic_clip.markup import to_latex, to_markdown
from tic_clip.page import to_html
from tic_clip.plots import compute, over_time, robustness, training
from tic_clip.storage import atomic_open, remove, to_path, write_json, write_text
from tic_clip.summary import Summaries, read_all, run_names
from tic_clip.tables import comparison_csv, headline, matrix_csv, read_published, tables

FIGURES = {"heatmap": heatmap, "curves": over_time, "compute": compute, "robustness": robustness}


def report(folders: list, output_dir: object, reference: str | None = None) -> tuple[Summaries, list[str]]:
    """Write every table and figure on the runs and models in ``folders`` into ``output_dir``.

    Args:
        reference: a CSV with published numbers to set beside ours (``tic_clip.paper.read_reference``).

    Returns:
        What was summarized, and the names of the files.

    Raises:
        TicError: a folder has no results that can be reported, or two are not comparable.
    """
    found = read_all(folders)
    published = read_published(reference, found) if reference else None
    items = tables(found, published)
    names = zip(run_names(folders), folders, strict=True)
    logs = {name: read_log(folder, found.runs[name]["steps"]) for name, folder in names if name in found.runs}
    figures = {name: draw(found) for name, draw in FIGURES.items()} | {"training": training(logs)}
    drawn = {name: {kind: to_bytes(figure, kind) for kind in FORMATS} for name, figure in figures.items() if figure}
    texts = {
        "matrix.csv": matrix_csv(found),
        "table.csv": comparison_csv(found),
        "table.md": to_markdown(items),
        "table.tex": to_latex(items),
        "report.html": to_html(found, headline(found, published), {name: each["png"] for name, each in drawn.items()}),
    }
    output = to_path(output_dir)
    write_json(output / "summary.json", found.content())
    for name, text in texts.items():
        write_text(output / name, text)
    for name in figures:
        for kind in FORMATS:
            _write_or_remove(output / f"{name}.{kind}", drawn.get(name, {}).get(kind))
    return found, ["summary.json", *texts, *(f"{name}.{kind}" for name in drawn for kind in FORMATS)]


def _write_or_remove(path: object, data: bytes | None) -> None:
    if data is None:
        remove(path)
        return
    with atomic_open(path) as file:
        file.write(data)
