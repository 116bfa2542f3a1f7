"""A table of text, and how it is written: for a terminal, as Markdown, as LaTeX; numbers as text."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

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
    text: int = 1  # so many columns at the left are words


def percent(value: float | None, deviation: float | None = None) -> str:
    """A fraction in per cent with one decimal."""
    around = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return MISSING if value is None else f"{100 * value:.1f}{around}"


def thousands(count: int | None) -> str:
    """A count with separators."""
    return MISSING if count is None else f"{count:,}"


def powers(count: float | None) -> str:
    """A large count with two digits."""
    return MISSING if count is None else f"{count:.1e}".replace("e+", "e")


def to_text(items: list[Table]) -> str:
    """``items`` as aligned text for a terminal."""
    return "\n\n".join(map(_to_text, items))


def _to_text(table: Table) -> str:
    legend = table.legend.replace("{mark}", "*")
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
    return column >= table.text


def to_markdown(items: list[Table]) -> str:
    """``items`` as Markdown."""

    def escape(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")

    def write(table: Table) -> str:
        rule = ["---:" if is_number(table, j) else "---" for j in range(len(table.header))]
        rows = [[escape(head) for head in table.header], rule, *_marked_rows(table, escape, "**{}**".format)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join(
            [f"**{escape(table.title)}**", "", *lines, "", escape(table.legend.replace("{mark}", "bold")), ""]
        )

    return "\n".join(map(write, items))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "…": "\\dots{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "±": "$\\pm$", "−": "$-$"}
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
