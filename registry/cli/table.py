"""Tables: rich's where they have to fit a width, else one plain line a row, for which rich need not be imported and a
list of 10,000 versions takes no seconds. Cells and texts must be `escaped`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from registry.cli.output import BOLD, drawn, paint

GAP = 2


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
    """The table, line by line, header first.

    Args:
        width: what it should fit in; wide cells are then folded over several lines, never cut. None: one line a row.
    """
    return _plain(columns, rows) if width is None else _fitted(columns, rows, width)


def _plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = _natural(columns, rows)
    for number, row in enumerate([[column.header for column in columns], *rows]):
        cells = []
        for cell, column, wanted in zip(row, columns, widths, strict=True):
            space = " " * (wanted - cell_width(cell))
            cells.append(space + cell if column.right else cell + space)
        line = (" " * GAP).join(cells).rstrip()
        yield paint(line, BOLD) if number == 0 else line


def _fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    from rich.table import Table
    from rich.text import Text

    natural = _natural(columns, rows)
    gap = GAP if sum(natural) + GAP * (len(columns) - 1) <= width else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for column, wanted in zip(columns, natural, strict=True):
        table.add_column(
            Text(column.header),
            justify="right" if column.right else "left",
            no_wrap=not column.least,
            min_width=min(column.least, wanted) if column.least else wanted,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return drawn(table, width)


def natural_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that a table takes with one line a row."""
    return sum(_natural(columns, rows)) + GAP * (len(columns) - 1)


def _natural(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max([cell_width(column.header), *(cell_width(row[index]) for row in rows)])
        for index, column in enumerate(columns)
    ]


def fold(text: str, width: int) -> list[str]:
    """Text over lines of a width, broken between words where that is possible."""
    if cell_width(text) <= width:
        return [text]
    from rich.text import Text

    return list(drawn(Text(text, overflow="fold"), width))


def cell_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )
