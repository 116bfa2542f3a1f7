"""A table of text, which terminal, Markdown, LaTeX and HTML format in their own ways."""

from itertools import zip_longest
from typing import NamedTuple

import pandas as pd

MISSING = "–"
MARK = "*"
NEAR = "~"
SETTINGS_LAST = ("method", "settings", "samples\nseen", "MACs", "results")
MAX_NUMBERED = 15
"""A matrix with more columns is drawn without numbers and not printed."""


class Table(NamedTuple):
    """A table of text; cells that end in ``MARK`` are bold in files, and ``legend`` says what they are."""

    title: str
    cells: pd.DataFrame
    legend: str = ""
    text: int = 1  # the number of text columns at the left
    shades: list[list[str]] | None = None  # of a matrix: the CSS of each cell after the first column
    hover: list[list[str]] | None = None  # and its tooltip

    @property
    def words(self) -> list[str]:
        """Return the text columns."""
        return list(self.cells.columns[: self.text])

    @property
    def page_cells(self) -> pd.DataFrame:
        """Return the cells with scores before settings, since a phone shows the left of a table."""
        last = [head for head in self.cells.columns[1:] if head in SETTINGS_LAST]
        return self.cells[[head for head in self.cells if head not in last] + last]


def percent(value: float, deviation: float = float("nan"), form: str = ".1f") -> str:
    """Return a share of 1 in per cent with one decimal."""
    return number(100 * value, form) + ("" if pd.isna(deviation) else f" ± {100 * deviation:.1f}")


def number(count: float | None, form: str = ",") -> str:
    """Return a number with thousands separators, or formatted by ``form``; a dash if it is missing."""
    return MISSING if pd.isna(count) else format(count, form).replace("e+", "e")


def to_text(table: Table) -> str:
    """Return a table as aligned text for a terminal."""
    if table.cells.shape[1] > MAX_NUMBERED + 1:
        return f"{table.title}\n({table.cells.shape[1]} columns: see table.md)\n{table.legend}"
    heads = zip_longest(*(head.split("\n") for head in table.cells), fillvalue="")
    columns = []
    for j, column in enumerate(zip(*heads, *table.cells.to_numpy(), strict=True)):
        padded = [cell if cell.endswith((MARK, NEAR)) else f"{cell} " for cell in column]
        width = max(map(len, padded))
        columns.append([cell.ljust(width) if j < table.text else cell.rjust(width) for cell in padded])
    aligned = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, "", *aligned, "", table.legend])


def write(value: object) -> str:
    """Return a setting as text."""
    return f"{value:,}" if isinstance(value, int) else str(value)
