"""Tables, figures and one self-contained HTML page from the results of runs and of models.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison

Reads ``R/eval_results.jsonl`` and, of runs, ``R/{step}/train.log.jsonl`` of each folder R. Writes summary.json,
matrix.csv, table.csv, table.md, table.tex, report.html, and a PNG and an SVG of each figure that has something to show.
Equal results and logs give equal bytes.
"""

import base64
import html
import re

import jinja2

from tic_clip.report.figures import draw_figures
from tic_clip.report.frame import Results, load_results, name_runs, summarize
from tic_clip.report.tables import (
    Table,
    compare,
    comparison_csv,
    data_tables,
    headline_tables,
    matrix_csv,
    matrix_tables,
    metric_notes,
    powers,
    thousands,
    to_text,
)
from tic_clip.results import read_log
from tic_clip.storage import atomic_open, remove, to_path, write_json, write_text

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "…": "\\dots{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "±": "$\\pm$", "−": "$-$", "\n": " "}
)


def report(folders: list, output_dir: object, reference: str | None = None) -> tuple[str, list[str]]:
    """Write every table and figure on the runs and models in ``folders`` into ``output_dir``.

    Args:
        reference: a CSV with published numbers to set beside ours.

    Returns:
        The tables as text for a terminal, and the names of the files.

    Raises:
        TicError: a folder has no results that can be reported, or two are not comparable.
    """
    results = load_results(folders)
    headline, data = headline_tables(results, reference), data_tables(results)
    names = zip(name_runs(folders), folders, strict=True)
    logs = {name: read_log(folder, results.steps(name)) for name, folder in names if name in results.runs}
    figures, summary = draw_figures(results, logs), summarize(results)
    texts = {
        "matrix.csv": matrix_csv(results),
        "table.csv": comparison_csv(compare(results)),
        "table.md": _render("table.md.j2", tables=headline + data),
        "table.tex": _render("table.tex.j2", tables=headline + data),
        "report.html": _render_page(results, headline, data, summary, figures),
    }
    output = to_path(output_dir)
    write_json(output / "summary.json", summary)
    for name, text in texts.items():
        write_text(output / name, text)
    for name, drawn in figures.items():
        for kind in ("png", "svg"):
            if not drawn:
                remove(output / f"{name}.{kind}")
                continue
            with atomic_open(output / f"{name}.{kind}") as file:
                file.write(drawn[kind])
    files = ["summary.json", *texts, *(f"{name}.{kind}" for name, drawn in figures.items() if drawn for kind in drawn)]
    return "\n\n".join(map(to_text, headline)), files


def _render(template: str, **values: object) -> str:
    """Return a template of this folder filled in; only HTML is escaped by jinja2, the others by their filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tic_clip.report", "."),
        autoescape=template.startswith("report.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": _escape_markdown, "tex": _escape_latex, "thousands": thousands, "powers": powers}
    return environment.get_template(template).render(**values)


def _escape_markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _escape_latex(text: str) -> str:
    power = re.fullmatch(r"(\d\.\d)e(\d+)", text)
    return rf"${power[1]} \times 10^{{{int(power[2])}}}$" if power else text.translate(LATEX)


def _render_page(results: Results, headline: list[Table], data: list[Table], summary: dict, figures: dict) -> str:
    single, counts = results.single, [(len(results.runs), "run"), (len(results.models), "model")]
    subjects = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for count, kind in counts if count)
    matrices = {name: [table for table in matrix_tables(results, name) if not table.wide] for name in results.runs}
    return _render(
        "report.html.j2",
        title=f"{results.benchmark.title}: {results.about(single)['method'] if single else f'{subjects} compared'}",
        subtitle="; ".join(metric_notes(results)),
        min_width=40 if len(results.runs) <= 2 else 56,
        tables=headline,
        data=data,
        matrices={} if single else {name: tables for name, tables in matrices.items() if tables},
        sources={name: base64.b64encode(drawn["png"]).decode() for name, drawn in figures.items() if drawn},
        subjects={single: summary} if single else summary.get("runs", {}) | summary.get("models", {}),
    )
