"""Tables in plain text. Not rich's: they are printed by the quickest command, where rich would cost an eighth of its
time, and a list of 10,000 versions, for which rich takes 6 seconds and this 0.1."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from registry.cli.output import BOLD, paint

GAP = 2
_BREAKS = " ,/-_.:@"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        right: numbers end below each other.
        least: how narrow it may become where the table has to fit; 0: it keeps its width.
    """

    header: str
    right: bool = False
    least: int = 0


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """The table, line by line, header first; cells must be escaped.

    Args:
        width: what it should fit in. Wide cells are then folded over several lines, never cut. None: one line a row.
    """
    widths = _natural(columns, rows)
    gap = GAP
    if width is not None and natural_width(columns, rows) > width:
        gap = 1
        widths = _shrunk(widths, columns, width - gap * (len(widths) - 1))
    between = " " * gap
    header = between.join(_padded(c.header, w, c.right) for c, w in zip(columns, widths, strict=True))
    yield paint(header.rstrip(), BOLD)
    for row in rows:
        folded = [fold(cell, w) for cell, w in zip(row, widths, strict=True)]
        for height in range(max(map(len, folded))):
            cells = (lines[height] if height < len(lines) else "" for lines in folded)
            padded = (_padded(cell, w, c.right) for cell, w, c in zip(cells, widths, columns, strict=True))
            yield between.join(padded).rstrip()


def natural_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Columns that a table takes with one line a row."""
    return sum(_natural(columns, rows)) + GAP * (len(columns) - 1)


def _natural(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max([cell_width(column.header), *(cell_width(row[index]) for row in rows)])
        for index, column in enumerate(columns)
    ]


def _shrunk(widths: Sequence[int], columns: Sequence[Column], room: int) -> list[int]:
    """Takes from the widest of the columns that may shrink until all fit, or none can give more."""
    shrunk = list(widths)
    while sum(shrunk) > room:
        able = [i for i, column in enumerate(columns) if column.least and shrunk[i] > column.least]
        if not able:
            break
        shrunk[max(able, key=lambda i: shrunk[i])] -= 1
    return shrunk


def fold(text: str, width: int) -> list[str]:
    """Text over lines of a width, broken after a separator in the second half of a line where there is one."""
    lines = []
    while cell_width(text) > width:
        end = _fitting(text, width)
        good = max((text.rfind(mark, end // 2, end) for mark in _BREAKS), default=-1)
        end = good + 1 if good > 0 else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text] if text or not lines else lines


def _fitting(text: str, width: int) -> int:
    """How many characters of a text fit in a width; at least one."""
    if text.isascii():
        return max(width, 1)
    used = 0
    for index, character in enumerate(text):
        used += cell_width(character)
        if used > width:
            return max(index, 1)
    return len(text)


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_width(text))
    return space + text if right else text + space


def cell_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )
