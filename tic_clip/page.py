"""The report as one self-contained HTML page; its frame is ``page.html`` beside this file."""

import base64
import html
from pathlib import Path

from tic_clip.tables import MISSING, Table, is_number, metric_notes, powers, thousands, total
from tic_clip.timeline import get_benchmark

FRAME = Path(__file__).with_name("page.html").read_text()
TRAINING = """<h2>Training</h2>
<div class="scroll"><img alt="Loss, learning rate and samples a second, against the samples seen"
 src="data:image/png;base64,{png}"></div>
<p class="legend">What training logged, against the samples that a run has seen.</p>
"""


def to_html(runs: dict[str, dict], items: list[Table], png: bytes, training: bytes | None = None) -> str:
    """One page with everything in it, also the figure ``training``: no script, no font, nothing to load."""
    first = next(iter(runs.values()))
    subject = first["method"] if len(runs) == 1 else f"{len(runs)} runs compared"
    return FRAME.format(
        title=html.escape(f"{get_benchmark(first['benchmark']).title}: {subject}"),
        subtitle=html.escape("; ".join(metric_notes(runs))),
        min_width=40 if len(runs) <= 2 else 56,
        png=base64.b64encode(png).decode(),
        training=TRAINING.format(png=base64.b64encode(training).decode()) if training else "",
        tables="\n".join(map(_html_table, items)),
        missing=MISSING,
        runs="\n".join(_html_run(name, run) for name, run in runs.items()),
    )


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
        "Samples seen": f"{thousands(total(run, 'samples_seen'))}, after {done} of {len(run['steps'])} steps",
        "MACs": powers(total(run, "macs_seen")),
        "Versions": ", ".join(f"{package} {version}" for package, version in run["pins"].items()) or MISSING,
    }
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f'<h3>{html.escape(name)}</h3>\n<dl class="run">{items}</dl>'
