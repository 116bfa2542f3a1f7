"""What the TiC-CLIP paper has: its static tasks, the points of its Figure 1, and a user's copy of its tables."""

import csv
from dataclasses import dataclass
from pathlib import Path

from tic_clip import TicError

IMAGENET, FLICKR = "imagenet1k", "retrieval/flickr_1k_test_image_text_retrieval"
SHIFTS = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"]
"""ImageNet's distribution shifts, as DataComp's list of tasks calls them; the paper averages them."""

UNIT = 5.0e18
"""MACs of a step of TiC-DataComp-large, C in the paper's figure."""
FIGURE_1 = {
    "from scratch": [(1, 24.7), (3, 34.1), (6, 38.4), (10, 41.3), (15, 42.7), (21, 44.3), (28, 45.3)],
    "warm start + replay": [(1, 24.7), (2, 34.6), (3, 38.2), (4, 40.2), (5.5, 42.0), (7.5, 43.8), (10.5, 45.6)],
}
"""(total compute in C, accuracy in per cent) of Figure 1, right: TiC-DataComp-large, ImageNet and its distribution
shifts; read off the picture, good to about 0.3."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Published numbers, in per cent: ``values[method][column]``."""

    name: str
    columns: list[str]
    values: dict[str, dict[str, float]]


def read_reference(path: str, methods: list[str], columns: list[str]) -> Reference:
    """Published numbers from a CSV whose columns are ``method`` and some of the comparison's; empty cells are left out.

    Args:
        methods: the methods, or names of runs or models, that there are to compare with.
        columns: the columns that the comparison has.

    Raises:
        TicError: a column or method matches nothing, or a number is none; the message has the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        raise TicError(f"{path} is missing") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise TicError(f"{path} is no CSV: {error}") from None
    head = [name.strip() for name in lines[0]] if lines else []
    if head[:1] != ["method"] or len(head) < 2:
        raise TicError(f"{path}: the first line must be method and columns, of: {', '.join(columns)}")
    for name in head[1:]:
        if name not in columns or head.count(name) > 1:
            raise TicError(
                f"{path}: no column {name!r} to compare with, or twice; the columns are {', '.join(columns)}"
            )
    values = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        where, method = f"{path}, line {number}", line[0].strip()
        if method not in methods or method in values:
            raise TicError(f"{where}: no method {method!r} to compare with, or twice; there are {', '.join(methods)}")
        if len(line) != len(head):
            raise TicError(f"{where} has {len(line)} cells, the first line has {len(head)}")
        cells = dict(zip(head[1:], line[1:], strict=True))
        values[method] = {name: _number(text, where) for name, text in cells.items() if text.strip()}
    return Reference(name=Path(path).name, columns=head[1:], values=values)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 100:
        raise TicError(f"{where}: {text.strip()!r} is no number in per cent, from 0 to 100")
    return value
