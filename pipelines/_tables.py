"""Tables of text for people: columns that line up, within the width of a page, and numbers that are short."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

WIDEST, NARROW = 10, 7
"""Longer headings are cut; more so where the table would be wider than a page."""
PAGE = 100


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "    ") -> Iterator[str]:
    """The lines of a table: the first column to the left, the others to the right. Rows may be shorter than the head.

    It is drawn closer together, and its headings cut, as far as a page asks for.
    """
    for gap, widest in ((2, WIDEST), (1, WIDEST), (1, NARROW)):
        cut = [head[0], *(short(cell, widest) for cell in head[1:])]
        widths = [max(len(row[n]) for row in (cut, *rows) if n < len(row)) for n in range(len(cut))]
        if len(indent) + sum(widths) + gap * (len(widths) - 1) <= PAGE:
            break
    for row in (cut, *rows):
        cells = [cell.ljust(widths[0]) if n == 0 else cell.rjust(widths[n]) for n, cell in enumerate(row)]
        yield (indent + (" " * gap).join(cells)).rstrip()


def number(value: float | None) -> str:
    """At most six characters, and three significant digits where these hold them; `-` for none.

    >>> [number(value) for value in (0.123456, None, 1294.0, 123456789.0, -0.0123, -1.234e-7)]
    ['0.123', '-', '1294', '1.23e8', '-0.012', '-1e-7']
    """
    if value is None:
        return "-"
    if abs(value) >= 1000 and len(whole := f"{value:.0f}") <= 6:
        return whole
    for digits in (3, 2, 1):
        plain = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
        text = re.sub(r"e([+-])0*", lambda found: "e" + found[1].replace("+", ""), plain)
        if len(text) <= 6:
            break
    return text


def short(name: str, most: int = WIDEST) -> str:
    """A name of at most so many characters.

    >>> short("aquarium fish")
    'aquarium …'
    """
    return name if len(name) <= most else name[: most - 1] + "…"
