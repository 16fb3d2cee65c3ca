"""errors.py: the tree, the exit codes, and the helpers that make messages. And every example in the docstrings of the parts."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re

import pytest

import kdprune_data
from kdprune_data import errors

MODULES = sorted(one.name for one in pkgutil.walk_packages(kdprune_data.__path__, "kdprune_data."))


def test_the_tree_is_the_one_drawn_at_the_top() -> None:
    drawn = dict(re.findall(r"(\w+Error)\s.*exit (\d)", errors.__doc__ or ""))
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.KdpruneError)}
    assert {name: str(kind.exit_code) for name, kind in found.items()} == drawn
    assert issubclass(errors.ExistsError, errors.UsageError)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("el2m", ["el2n", "aum"], "unknown score 'el2m'; did you mean 'el2n'? known: aum, el2n"),
        ("EL2N", ["el2n", "aum"], "unknown score 'EL2N'; did you mean 'el2n'? known: aum, el2n"),
        ("zzz", ["el2n", "aum"], "unknown score 'zzz'; known: aum, el2n"),
        ("", [], "unknown score ''; known: "),
    ],
)
def test_unknown_lists_the_known(name: str, known: list[str], message: str) -> None:
    assert str(errors.unknown("score", name, known)) == message


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  padded  \nmore"), "padded"),
        (ValueError(""), "ValueError"),
        (OSError("x" * 500), "x" * 200),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert errors.first_line(error) == line


@pytest.mark.parametrize(
    ("n", "limit", "text"),
    [(0, 3, ""), (1, 3, "'0'"), (3, 3, "'0', '1', '2'"), (5, 3, "'0', '1', '2' and 2 more"), (1500, 1, "'0' and 1,499 more")],
)
def test_some(n: int, limit: int, text: str) -> None:
    assert errors.some((str(i) for i in range(n)), limit) == text


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 5
