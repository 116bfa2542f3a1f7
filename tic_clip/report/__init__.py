"""Tables, figures and a self-contained HTML page from the results of runs and models.

Reads ``eval_results.jsonl`` and, of runs, ``{step}/train.log.jsonl`` in each folder. Equal input gives equal bytes.
"""

import base64
import html
import json
import re

import jinja2

from tic_clip import TicError
from tic_clip.report import matrices, tables
from tic_clip.report.compare import compare
from tic_clip.report.figures import draw_figures
from tic_clip.report.frame import load_results, summarize
from tic_clip.report.paired import compare_pair, paired_tables
from tic_clip.report.table import MARK, NEAR, to_text
from tic_clip.storage import atomic_open, remove, to_path

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "±": "$\\pm$"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "\n": " "}
)


def report(
    folders: list, output_dir: object, reference: str | None = None, paired: bool = False
) -> tuple[str, list[str]]:
    """Write all tables and figures of ``folders`` to ``output_dir``; return the text for a terminal and the file names.

    ``reference``: a CSV of published numbers in per cent with the column ``method`` and some of the comparison's.
    ``paired``: test whether two runs or models differ; without an ``output_dir``, do only that.
    """
    results = load_results(folders)
    pairs = compare_pair(results) if paired else None
    if output_dir is None:
        return "\n\n".join(map(to_text, paired_tables(results, pairs))), []
    runs, models = ({one.name: summarize(one) for one in part} for part in (results.runs, results.models))
    summary = {kind: part for kind, part in (("runs", runs), ("models", models)) if part}
    if not results.tasks and not results.static_keys:
        raise TicError(f"nothing to report: no result in {', '.join(map(str, folders))} has a number")
    compared = compare(results)
    figures = draw_figures(results, compared)
    parts = tables.headline_tables(results, compared, reference)
    parts |= {"paired": [] if pairs is None else paired_tables(results, pairs)}
    names = ", ".join(runs | models) if len(results.subjects) <= 4 else f"{len(results.subjects)} compared"
    values = parts | {
        "title": f"{results.title}: {names}",
        "what": tables.describe(results),
        "cards": tables.read_cards(results, compared),
        "headline": [table for part in parts.values() for table in part],
        "folded": []
        if results.single
        else [table for one in results.groups for table in matrices.matrix_tables(one, results)],
        "data": tables.data_tables(runs | models),
        "about": tables.about_table(results, runs | models),
        "figures": figures,
    }
    only = runs[results.runs[0].name] if len(summary) == len(runs) == 1 else summary
    texts = {
        "summary.json": json.dumps(only, indent=2) + "\n",
        "matrix.csv": matrices.matrix_csv(results),
        "table.csv": tables.comparison_csv(compared),
        "paired.csv": "" if pairs is None else pairs.to_csv(index=False, lineterminator="\n"),
    }
    texts |= {name: _render(f"{name}.j2", values) for name in ("table.md", "table.tex", "report.html")}
    files = {name: text.encode() for name, text in texts.items()} | figures
    for name, data in files.items():
        if not data:
            remove(to_path(output_dir) / name)
            continue
        with atomic_open(to_path(output_dir) / name) as file:
            file.write(data)
    printed = [table for part in parts if part != "forgetting" for table in parts[part]]
    return "\n\n".join(map(to_text, printed)), [name for name, data in files.items() if data]


def _render(template: str, values: dict[str, object]) -> str:
    """Return a rendered template; jinja2 escapes HTML, filters escape Markdown and LaTeX."""
    loader = jinja2.PackageLoader("tic_clip.report", ".")
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, autoescape="html" in template, **blocks)
    environment.filters |= {"md": _escape_markdown, "tex": _escape_latex, "base64": base64.b64encode}
    return environment.get_template(template).render(MARK=MARK, NEAR=NEAR, **values)


def _escape_markdown(text: str) -> str:
    text = html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
    return f"**{text[:-1]}**" if text.endswith(MARK) else text


def _escape_latex(text: str) -> str:
    if text.endswith(MARK):
        return f"\\textbf{{{_escape_latex(text[:-1])}}}"
    return re.sub(r"^(\d\.\d)e(\d+)$", r"$\1 \\times 10^{\2}$", text.translate(LATEX))
