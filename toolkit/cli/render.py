"""Output functions that all commands share: tables that fit the terminal, and colours.

Colours are used only on a terminal, and not if NO_COLOR is set (https://no-color.org). Output
without colours has the same information, because every coloured text also says in words what the
colour means.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_WIDTH = 80
VERDICT_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "magenta"}


def uses_colours() -> bool:
    """Whether standard output supports colours and the user wants them."""
    return not os.environ.get("NO_COLOR") and sys.stdout.isatty()


def styled(text: str, colour: str | None = None, *, bold: bool = False) -> str:
    """Return the text in a colour. If colours are off, return the text unchanged."""
    if not uses_colours() or not (colour or bold):
        return text
    return click.style(text, fg=colour, bold=bold or None)


def verdict_word(verdict: str) -> str:
    """Return the verdict in its colour, padded to the length of the longest verdict."""
    return styled(f"{verdict:<7}", VERDICT_COLOURS.get(verdict), bold=verdict == "fail")


def terminal_width() -> int:
    """Return the width of the terminal in columns, at least 80. The environment variable COLUMNS
    overrides the width.
    """
    return max(MIN_WIDTH, shutil.get_terminal_size((100, 24)).columns)


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Return the rows as aligned columns, two spaces apart. ``right`` contains the indices of the
    right-aligned columns.

    If the table is wider than the terminal, the widest column other than the first is wrapped.
    """
    cells = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    excess = sum(widths) + 2 * (len(widths) - 1) - terminal_width()
    if excess > 0:
        # The first column is never wrapped, because it contains names that users copy.
        widest = max(range(len(widths))[1:] or [0], key=widths.__getitem__)
        widths[widest] = max(8, widths[widest] - excess)
    head, *lines = [line for row in cells for line in _row_lines(row, widths, right)]
    return "\n".join([styled(head, bold=True), *lines])


def _row_lines(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> list[str]:
    """Return the lines of one row. A cell that is longer than its column is wrapped to several
    lines.
    """
    cells = [textwrap.wrap(text, width) for text, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        aligned = [
            part.rjust(width) if column in right else part.ljust(width)
            for column, (part, width) in enumerate(zip(parts, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return lines


def wrap_text(text: str, *, first: str = "", indent: str = "") -> str:
    """Return the text wrapped to the width of the terminal. ``first`` is put before the first line,
    and ``indent`` before the other lines.
    """
    return textwrap.fill(
        text,
        width=min(terminal_width(), 110),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
