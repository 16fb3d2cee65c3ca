"""`--where`: an expression over columns, read by a small parser of our own and never run as code.

    expression   = conjunction { "or" conjunction }
    conjunction  = negation { "and" negation }
    negation     = "not" negation | "(" expression ")" | comparison
    comparison   = operand sign operand { sign operand }
                 | operand [ "not" ] "in" "(" literal { "," literal } ")"
    sign         = "<" | "<=" | ">" | ">=" | "==" | "!="
    operand      = column | literal
    literal      = number, such as 7, -0.5, 1e-3 | text in single or double quotes

The words may be in capitals. `a < b < c` means `a < b and b < c`. Texts are compared with `==`, `!=` and `in` alone. A comparison with a
value that is missing (a sample without a label) is false, whatever its sign; `not` of it is true.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdprune_data.errors import UsageError, unknown

Rows = NDArray[np.bool_]
Columns = Mapping[str, NDArray[Any]]
Test = Callable[[Columns], Rows]

SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
WORDS = ("and", "or", "not", "in")
TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))|(?P<text>"[^"]*"|'[^']*')"""
    r"""|(?P<name>[A-Za-z_]\w*)|(?P<sign><=|>=|==|!=|<|>)|(?P<mark>[(),]))"""
)
DEEPEST = 50
"""Parentheses and `not`s inside one another."""


@dataclass(frozen=True)
class Where:
    """An expression that was read. names: the columns it compares; test: of columns of one length, those names among them, which rows it
    holds for: bool of shape (n,). Columns of numbers are floating, NaN where missing; of texts object, None where missing."""

    names: frozenset[str]
    test: Test


@dataclass(frozen=True)
class _Token:
    """A piece of the text: what it is (`number text name word sign mark end`), and the character it begins at, from 1."""

    kind: str
    text: str
    at: int


@dataclass(frozen=True)
class _Operand:
    """A column (by name) or a literal (its value), whether it is text, and where it stands."""

    name: str | None
    value: float | str | None
    is_text: bool
    token: _Token

    def of(self, columns: Columns) -> Any:
        return self.value if self.name is None else columns[self.name]


def parse(text: str, numbers: Collection[str], texts: Mapping[str, Collection[str] | None]) -> Where:
    """Read an expression. numbers: the names of columns of numbers; texts: of columns of texts, each with the values that it may be
    compared with, None: any.

    Raises UsageError for what is no expression, a column that is not there, or a text where a number must stand; it names the place.
    """
    return _Parser(text, numbers, texts).whole()


class _Parser:
    def __init__(self, text: str, numbers: Collection[str], texts: Mapping[str, Collection[str] | None]) -> None:
        self._numbers, self._texts = numbers, texts
        self._tokens = list(_tokens(text))
        self._names: set[str] = set()
        self._at = self._depth = 0

    def whole(self) -> Where:
        test = self._expression()
        if self._next.kind != "end":
            raise _error(self._next, "and, or, or the end")
        return Where(frozenset(self._names), test)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _met(self, *texts: str) -> bool:
        """Take the next token if it is one of these words or marks."""
        found = self._next.kind in ("word", "mark") and self._next.text in texts
        self._at += found
        return found

    def _expression(self) -> Test:
        parts = [self._conjunction()]
        while self._met("or"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else lambda columns: np.logical_or.reduce([part(columns) for part in parts])

    def _conjunction(self) -> Test:
        parts = [self._negation()]
        while self._met("and"):
            parts.append(self._negation())
        return _all(parts)

    def _negation(self) -> Test:
        first = self._next
        if not self._met("not", "("):
            return self._comparison()
        self._depth += 1
        if self._depth > DEEPEST:
            raise UsageError(f"--where, character {first.at}: more than {DEEPEST} parentheses inside one another; write it flatter")
        if first.text == "not":
            inner = self._negation()
            self._depth -= 1
            return lambda columns: ~inner(columns)
        whole = self._expression()
        self._depth -= 1
        if not self._met(")"):
            raise _error(self._next, "and, or, or )")
        return whole

    def _comparison(self) -> Test:
        left = self._operand()
        if self._next.text in ("in", "not") and self._next.kind == "word":
            return self._membership(left)
        if self._next.kind != "sign":
            raise _error(self._next, f"one of {' '.join(SIGNS)}, or in")
        parts = []
        while self._next.kind == "sign":
            sign = self._take()
            right = self._operand()
            parts.append(self._pair(left, sign, right))
            left = right
        return _all(parts)

    def _membership(self, left: _Operand) -> Test:
        word = self._take()
        negated = word.text == "not"
        if negated and not self._met("in"):
            raise _error(self._next, "in")
        if not self._met("("):
            raise _error(self._next, "( after in")
        same = _Token("sign", "==", word.at)
        tests = [self._pair(left, same, self._literal())]
        while self._met(","):
            tests.append(self._pair(left, same, self._literal()))
        if not self._met(")"):
            raise _error(self._next, ", or )")
        if not negated:
            return lambda columns: np.logical_or.reduce([test(columns) for test in tests])
        return lambda columns: _there(left.of(columns)) & ~np.logical_or.reduce([test(columns) for test in tests])

    def _literal(self) -> _Operand:
        found = self._operand()
        if found.name is not None:
            raise _error(found.token, "a number or a text in quotes")
        return found

    def _operand(self) -> _Operand:
        token = self._take()
        match token.kind:
            case "number":
                return _Operand(None, float(token.text), False, token)
            case "text":
                return _Operand(None, token.text[1:-1], True, token)
            case "name":
                if token.text not in self._numbers and token.text not in self._texts:
                    known = unknown("column", token.text, [*self._numbers, *self._texts])
                    raise UsageError(f"--where, character {token.at}: {known}; a text stands in quotes")
                self._names.add(token.text)
                return _Operand(token.text, None, token.text in self._texts, token)
        raise _error(token, "a column, a number, or a text in quotes")

    def _pair(self, left: _Operand, sign: _Token, right: _Operand) -> Test:
        if left.name is None and right.name is None:
            raise UsageError(
                f"--where, character {left.token.at}: {left.token.text} and {right.token.text} are no columns: compare a column"
            )
        if left.is_text != right.is_text:
            raise UsageError(
                f"--where, character {right.token.at}: {left.token.text} is a {_kind(left)} and {right.token.text} a {_kind(right)}: "
                "texts stand in quotes, numbers do not"
            )
        if left.is_text and sign.text not in ("==", "!="):
            raise UsageError(f"--where, character {sign.at}: {sign.text} compares numbers: for texts there are ==, != and in")
        for one, other in ((left, right), (right, left)):
            allowed = self._texts.get(one.name or "")
            if allowed is not None and other.name is None and other.value not in allowed:
                raise UsageError(f"--where, character {other.token.at}: {unknown(one.token.text, str(other.value), allowed)}")
        compare = SIGNS[sign.text]
        return lambda columns: _compared(compare, left.of(columns), right.of(columns))


def _tokens(text: str) -> list[_Token]:
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise _wrong_character(text, at)
        kind = str(match.lastgroup)
        piece, place = match[kind], match.start(kind) + 1
        if kind == "name" and piece.lower() in WORDS:  # as in SQL, in any case
            kind, piece = "word", piece.lower()
        found.append(_Token(kind, piece, place))
        at = match.end()
    return [*found, _Token("end", "", len(text) + 1)]


def _wrong_character(text: str, at: int) -> UsageError:
    rest = text[at:]
    word = re.match(r"[\w.+-]+", rest)
    piece = repr(word[0] if word else rest[0])
    hint = "expected a column, a number, a text in quotes or a sign"
    if rest[0] == "=":
        hint = "two of them compare: =="
    elif rest[0] in "\"'":
        piece, hint = rest[0], "the text that it begins does not end"
    elif rest[0] in "&|!":
        hint = "write and, or, not"
    return UsageError(f"--where, character {at + 1}: {piece}: {hint}")


def _error(token: _Token, expected: str) -> UsageError:
    found = "the end" if token.kind == "end" else repr(token.text)
    return UsageError(f"--where, character {token.at}: found {found}, expected {expected}")


def _kind(operand: _Operand) -> str:
    return "text" if operand.is_text else "number"


def _all(parts: list[Test]) -> Test:
    return parts[0] if len(parts) == 1 else lambda columns: np.logical_and.reduce([part(columns) for part in parts])


def _there(value: Any) -> Any:
    """Which values are not missing."""
    if isinstance(value, float | str):
        return True
    return value != None if value.dtype == object else ~np.isnan(value)  # noqa: E711 - element by element


def _compared(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> Rows:
    return np.asarray(_there(left) & _there(right) & compare(left, right).astype(bool), bool)
