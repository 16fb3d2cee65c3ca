"""Tables of text for people: columns that line up, numbers short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WIDEST = 10
"""Longer headings and names are cut."""


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> Iterator[str]:
    """The lines of a table: the first column to the left, the others to the right. Rows may be shorter than the head."""
    cut = [head[0], *(short(cell) for cell in head[1:])]
    widths = [max(len(row[n]) for row in (cut, *rows) if n < len(row)) for n in range(len(cut))]
    for row in (cut, *rows):
        cells = [cell.ljust(widths[0]) if n == 0 else cell.rjust(widths[n]) for n, cell in enumerate(row)]
        yield (indent + "  ".join(cells)).rstrip()


def number(value: float | None) -> str:
    """Four significant digits; `-` for none.

    >>> number(0.123456), number(None), number(1294.0)
    ('0.1235', '-', '1294')
    """
    return "-" if value is None else f"{value:.4g}"


def short(name: str) -> str:
    """A name of at most ten characters.

    >>> short("aquarium fish")
    'aquarium …'
    """
    return name if len(name) <= WIDEST else name[: WIDEST - 1] + "…"
