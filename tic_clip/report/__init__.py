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

from tic_clip.report import tables
from tic_clip.report.figures import FORMATS, draw_figures
from tic_clip.report.frame import load_results, summarize
from tic_clip.storage import atomic_open, remove, to_path, write_json, write_text

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "…": "\\dots{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "±": "$\\pm$", "−": "$-$", "\n": " "}
)


def report(folders: list, output_dir: object, reference: str | None = None) -> tuple[str, list[str]]:
    """Write all tables and figures of ``folders`` into ``output_dir``; return the text for a terminal, and file names.

    ``reference``: a CSV of published numbers in per cent; its columns are ``method`` and some of the comparison's.
    """
    results = load_results(folders)
    summaries = {one.name: summarize(one) for one in results.subjects}
    parts = {"runs": results.runs, "models": results.models}
    summary = {kind: {one.name: summaries[one.name] for one in part} for kind, part in parts.items() if part}
    compared, figures, output = tables.compare(results), draw_figures(results), to_path(output_dir)
    headline = tables.headline_tables(results, compared, reference)
    values = {"results": results, "headline": headline, "data": tables.data_tables(results, summaries)}
    page = {
        "subjects": summaries,
        "notes": tables.metric_notes(results),
        "matrices": {run.name: tables.matrix_tables(run) for run in results.runs if not results.single},
        "sources": {name: base64.b64encode(drawn["png"]).decode() for name, drawn in figures.items() if drawn},
    }
    texts = {
        "matrix.csv": tables.matrix_csv(results),
        "table.csv": tables.comparison_csv(compared),
        "table.md": _render("table.md.j2", **values),
        "table.tex": _render("table.tex.j2", **values),
        "report.html": _render("report.html.j2", **values, **page),
    }
    write_json(output / "summary.json", summaries[results.single.name] if results.single else summary)
    for name, text in texts.items():
        write_text(output / name, text)
    for name, drawn in figures.items():
        for kind in FORMATS:
            if not drawn:
                remove(output / f"{name}.{kind}")
                continue
            with atomic_open(output / f"{name}.{kind}") as file:
                file.write(drawn[kind])
    images = [f"{name}.{kind}" for name, drawn in figures.items() for kind in drawn]
    return "\n\n".join(map(tables.to_text, headline)), ["summary.json", *texts, *images]


def _render(template: str, **values: object) -> str:
    """Return a template of this folder filled in; only HTML is escaped by jinja2, the others by their filters."""
    loader = jinja2.PackageLoader("tic_clip.report", ".")
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, autoescape="html" in template, **blocks)
    environment.filters |= {"md": _escape_markdown, "tex": _escape_latex, "number": tables.number}
    return environment.get_template(template).render(**values)


def _escape_markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _escape_latex(text: str) -> str:
    power = re.fullmatch(r"(\d\.\d)e(\d+)", text)
    return rf"${power[1]} \times 10^{{{int(power[2])}}}$" if power else text.translate(LATEX)
