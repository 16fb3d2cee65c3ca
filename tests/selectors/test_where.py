"""selectors/where.py: what an expression holds for, against Python's own reading of the same text; what is refused, and where."""

from __future__ import annotations

import contextlib
import math
import random

import numpy as np
import pytest

from kdprune_data.errors import UsageError
from kdprune_data.selectors.where import DEEPEST, SIGNS, parse

NUMBERS = ("label", "el2n", "loss", "tie")
ROWS = [
    {"label": 7.0, "el2n": 1.1, "loss": -0.5, "tie": 0.0, "kind": "cat", "id": "a"},
    {"label": 3.0, "el2n": 1.2, "loss": 0.0, "tie": 0.0, "kind": "dog", "id": "b"},
    {"label": math.nan, "el2n": 0.3, "loss": 2.5, "tie": 0.0, "kind": None, "id": "not in"},
    {"label": 0.0, "el2n": 1e-3, "loss": 1e3, "tie": 0.0, "kind": "cat", "id": ""},
]
COLUMNS = {name: np.array([row[name] for row in ROWS], object if name in ("kind", "id") else float) for name in ROWS[0]}


def read(text: str) -> list[bool]:
    found = parse(text, NUMBERS, {"kind": ("cat", "dog"), "id": None}).test(COLUMNS)
    assert (found.dtype, found.shape) == (bool, (len(ROWS),))
    return found.tolist()


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("label == 7", "1000"),
        ("label != 7", "0101"),
        ("not label == 7", "0111"),
        ("label != 7 and el2n < 1.2", "0001"),
        ("label==7 or(el2n<=.3)", "1011"),
        ("label == 7 or label == 3 and el2n > 5", "1000"),
        ("(label == 7 or label == 3) and el2n > 1.15", "0100"),
        ("not not label == 7", "1000"),
        ("not label == 7 and el2n < 1", "0011"),
        ("loss >= -0.5", "1111"),
        ("loss > -.5", "0111"),
        ("loss == +1e3", "0001"),
        ("-1 < loss < 1", "1100"),
        ("0 < el2n < loss < 5", "0010"),
        ("1.2 == el2n", "0100"),
        ("tie == tie", "1111"),
        ("label in (7, 3)", "1100"),
        ("label not in (7, 3)", "0001"),
        ("not label in (7, 3)", "0011"),
        ("kind == 'cat'", "1001"),
        ('kind != "cat"', "0100"),
        ("kind not in ('cat')", "0100"),
        ("id == 'not in'", "0010"),
        ("id in ('', 'b')", "0101"),
        ("  ( label==7 )\n", "1000"),
        ("label < label", "0000"),
        ("label == 7 OR NOT label IN (7, 0) And el2n < 5", "1110"),
    ],
)
def test_expressions(text: str, holds: str) -> None:
    assert "".join("01"[value] for value in read(text)) == holds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "--where, character 1: found the end, expected a column, a number, or a text in quotes"),
        ("label", "--where, character 6: found the end, expected one of < <= > >= == !=, or in"),
        ("label = 7", "--where, character 7: '=': two of them compare: =="),
        ("el2m < 1", "--where, character 1: unknown column 'el2m'; did you mean 'el2n'? known: el2n, id, kind, label, loss, tie"),
        ("(label == 7", "--where, character 12: found the end, expected and, or, or )"),
        ("label == 7)", "--where, character 11: found ')', expected and, or, or the end"),
        ("label == 7 el2n < 1", "--where, character 12: found 'el2n', expected and, or, or the end"),
        ("label == 7 & el2n < 1", "--where, character 12: '&': write and, or, not"),
        ("label == seven", "--where, character 10: unknown column 'seven'"),
        ("label == 'seven'", "--where, character 10: label is a number and 'seven' a text: texts stand in quotes, numbers do not"),
        ("kind == 7", "--where, character 9: kind is a text and 7 a number"),
        ("kind < 'cat'", "--where, character 6: < compares numbers: for texts there are ==, != and in"),
        ("kind == 'cow'", "--where, character 9: unknown kind 'cow'; known: cat, dog"),
        ("kind in ('cat', 'cow')", "--where, character 17: unknown kind 'cow'"),
        ("kind == 'cat", "--where, character 9: ': the text that it begins does not end"),
        ("label in 7", "--where, character 10: found '7', expected ( after in"),
        ("label in ()", "--where, character 11: found ')', expected a column, a number, or a text in quotes"),
        ("label in (el2n)", "--where, character 11: found 'el2n', expected a number or a text in quotes"),
        ("label in (1 2)", "--where, character 13: found '2', expected , or )"),
        ("label not 7", "--where, character 11: found '7', expected in"),
        ("1 < 2", "--where, character 1: 1 and 2 are no columns: compare a column"),
        ("el2n < 1.2.3", "--where, character 8: '1.2.3': expected a column"),
        ("el2n < 0x10", "--where, character 8: '0x10': expected a column"),
        ("el2n < nan", "--where, character 8: unknown column 'nan'"),
        ("__import__('os')", "--where, character 1: unknown column '__import__'"),
        ("el2n.real < 1", "--where, character 5: '.real': expected"),
        ("el2n < 1 and and", "--where, character 14: found 'and', expected a column"),
        ("(" * (DEEPEST + 1) + "tie == 0" + ")" * (DEEPEST + 1), f"character {DEEPEST + 1}: more than {DEEPEST} parentheses"),
        ("not " * 10_000 + "tie == 0", f"more than {DEEPEST} parentheses"),
    ],
)
def test_what_is_no_expression(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nesting_as_deep_as_is_allowed() -> None:
    assert all(read("(" * DEEPEST + "tie == 0" + ")" * DEEPEST))
    assert all(read(" or ".join(["(tie == 0)"] * 500)))


def test_the_columns_that_are_named() -> None:
    found = parse("el2n < 1 or not kind == 'cat'", NUMBERS, {"kind": None})
    assert found.names == {"el2n", "kind"}


def expression(rng: random.Random, depth: int) -> str:
    """A random expression that Python reads as well: columns without missing values, and at least one in each comparison."""
    if depth == 0 or rng.random() < 0.2:
        column = rng.choice(["el2n", "loss", "tie"])
        if rng.random() < 0.3:
            return f"{column} {rng.choice(['in', 'not in'])} ({', '.join(str(rng.choice([0, 1.1, -0.5, 1e3])) for _ in range(3))})"
        others = [rng.choice(["el2n", "loss", "tie"]) if rng.random() < 0.5 else str(rng.choice([0, 1.1, 1.2, -0.5, 2.5])) for _ in "ab"]
        chain = f" {rng.choice(list(SIGNS))} {others[1]}" if rng.random() < 0.3 and not (others[0] + others[1])[0].isdigit() else ""
        chain = chain if others[0] in NUMBERS else ""
        return f"{column} {rng.choice(list(SIGNS))} {others[0]}{chain}"
    match rng.randrange(4):
        case 0:
            return f"not {expression(rng, depth - 1)}"
        case 1:
            return f"({expression(rng, depth - 1)})"
    return f"{expression(rng, depth - 1)} {rng.choice(['and', 'or'])} {expression(rng, depth - 1)}"


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions_mean_what_python_means_by_them(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        text = expression(rng, 5)
        wanted = [bool(eval(text, {}, {name: row[name] for name in ("el2n", "loss", "tie")})) for row in ROWS]
        assert read(text) == wanted, text


@pytest.mark.parametrize("seed", range(20))
def test_damaged_expressions_are_read_or_refused(seed: int) -> None:
    """Never another error, whatever stands in the text."""
    rng = random.Random(seed)
    for _ in range(50):
        text = list(expression(rng, 3))
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(["", "(", ")", "'", "=", "<", "!", " not ", ",", "é", "\n", "9"])
        with contextlib.suppress(UsageError):
            read("".join(text))
