"""The report as one self-contained HTML page; its frame is ``page.html`` beside this file."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from tic_clip.coverage import coverage
from tic_clip.markup import MISSING, Table, is_number, powers, thousands
from tic_clip.summary import Summaries, total
from tic_clip.tables import matrices, metric_notes

FRAME = Path(__file__).with_name("page.html").read_text()
CAPTIONS = {
    "heatmap": ("Step by period", "Heat map of the step by period matrix; its numbers are in the tables and files", ""),
    "curves": (
        "Over time",
        "The main metric over the periods of the data",
        "How good models are on the data of each period: of one run each step's model, of several runs the last.",
    ),
    "compute": (
        "Compute",
        "Accuracy against total compute",
        "What a run has gained for the compute that it has spent up to each step; further left and higher is better.",
    ),
    "robustness": (
        "Robustness over time",
        "Retrieval on new data against retrieval on old data, by model",
        "Each point is a model. Below the dashed line it does worse on new data than on old data.",
    ),
    "training": (
        "Training",
        "Loss, learning rate and samples a second, against the samples seen",
        "What training logged, against the samples that a run has seen.",
    ),
}
"""Heading, alternative text and caption of each figure, in the order of the page."""


def to_html(found: Summaries, items: list[Table], figures: dict[str, bytes]) -> str:
    """One page with everything in it: no script, no font, nothing to load.

    Args:
        items: the tables that come first.
        figures: PNGs by the names of ``CAPTIONS``.
    """
    everything = found.everything
    single = found.single
    counts = [(len(part), kind) for part, kind in ((found.runs, "run"), (found.models, "model")) if part]
    subjects = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for count, kind in counts)
    subject = single["method"] if single else f"{subjects} compared"
    return FRAME.format(
        title=html.escape(f"{found.benchmark.title}: {subject}"),
        subtitle=html.escape("; ".join(metric_notes(found))),
        min_width=40 if len(found.runs) <= 2 else 56,
        tables="\n".join(map(_html_table, items)),
        figures="\n".join(_html_figure(name, figures[name]) for name in CAPTIONS if name in figures),
        matrices=_html_matrices(found),
        behind=_html_section("Evaluation data and missing results", map(_html_table, coverage(found))),
        missing=MISSING,
        runs="\n".join(_html_run(name, one) for name, one in everything.items()),
    )


def _html_matrices(found: Summaries) -> str:
    """The matrices of several runs, folded up; that of a single run stands among the results, wide ones in files."""
    tables = {name: [each for each in few if not each.wide] for name, few in matrices(found).items()}
    folded = [
        f"<details><summary>{html.escape(name)}</summary>\n{chr(10).join(map(_html_table, few))}</details>"
        for name, few in tables.items()
        if few and not found.single
    ]
    return _html_section("The matrices in numbers", folded)


def _html_section(heading: str, parts: Iterable[str]) -> str:
    content = "\n".join(parts)
    return f"<h2>{heading}</h2>\n{content}" if content else ""


def _html_figure(name: str, png: bytes) -> str:
    heading, alt, caption = CAPTIONS[name]
    wide = ' class="wide"' if name in ("heatmap", "curves") else ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    lines = [f"<h2>{heading}</h2>", f'<div class="scroll"><img{wide} alt="{alt}" src="{source}"></div>']
    return "\n".join([*lines, f'<p class="legend">{caption}</p>'] if caption else lines)


def _html_table(table: Table) -> str:
    def cell(tag: str, j: int, text: str, mark: bool = False) -> str:
        names = " ".join(["text"] * (not is_number(table, j)) + ["mark"] * mark)
        return f'<{tag} class="{names}">{html.escape(text)}</{tag}>' if names else f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", j, text) for j, text in enumerate(table.header))
    rows = [
        "<tr>" + "".join(cell("td", j, text, (i, j) in table.marked) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(table.rows)
    ]
    return "\n".join(
        [
            f"<h3>{html.escape(table.title)}</h3>",
            f'<div class="scroll" tabindex="0"><table aria-label="{html.escape(table.title)}">',
            f"<thead><tr>{head}</tr></thead>",
            f"<tbody>{''.join(rows)}</tbody></table></div>",
            f'<p class="legend">{html.escape(table.legend.replace("{mark}", "bold"))}</p>',
        ]
    )


def _html_run(name: str, one: dict) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in one["pins"].items()) or MISSING
    if "steps" in one:
        done = sum(seen is not None for seen in one["samples_seen"])
        facts = {
            "Method": one["method"],
            "Scale": one["scale"],
            "Training data": one.get("filter", MISSING),
            "Seed": str(one.get("seed", MISSING)),
            "Samples seen": f"{thousands(total(one, 'samples_seen'))}, after {done} of {len(one['steps'])} steps",
            "MACs": powers(total(one, "macs_seen")),
        }
    else:
        facts = {"Family": one["family"] or MISSING}
    items = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
        for key, value in {**facts, "Versions": versions}.items()
    )
    return f'<h3>{html.escape(name)}</h3>\n<dl class="run">{items}</dl>'
