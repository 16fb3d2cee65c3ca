"""config.py: the only way in from text is checked: unknown keys, types, choices and limits, each refused in one line."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdprune_data.config import Config, option
from kdprune_data.errors import UsageError


@dataclass(frozen=True)
class Sample(Config):
    source: str = option(help="a text", argument=True)
    folder: Path | None = option(None, help="a path")
    files: tuple[Path, ...] = option((), help="paths")
    balance: str = option("class", help="a choice", choices=("class", "none"))
    epochs: int = option(30, help="a count", least=1, most=1000)
    alpha: float = option(0.5, help="a number", least=0, most=1)
    dry: bool = option(False, help="a switch")
    seed: int = option(0, help="a number", least=0)


def made(**values: Any) -> Sample:
    return Sample.from_dict({"source": "x"} | values)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"folder": "a/b"}, "folder", Path("a/b")),
        ({"folder": None}, "folder", None),
        ({"files": ["a", "b"]}, "files", (Path("a"), Path("b"))),
        ({"files": "a"}, "files", (Path("a"),)),
        ({"files": Path("a")}, "files", (Path("a"),)),
        ({"alpha": 1}, "alpha", 1.0),
        ({"source": 0.1}, "source", "0.1"),
        ({"source": 5}, "source", "5"),
        ({"dry": True}, "dry", True),
    ],
)
def test_plain_values_become_the_fields_type(given: dict[str, Any], field: str, value: Any) -> None:
    found = getattr(made(**given), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'? known: alpha, balance, dry, epochs, files, folder, seed, source"),
        ({"zzz": 3}, "unknown option 'zzz'; known: alpha, balance, dry, epochs, files, folder, seed, source"),
        ({"balance": "clas"}, "unknown balance 'clas'; did you mean 'class'? known: class, none"),
        ({"epochs": 0}, "--epochs 0 is too small: at least 1"),
        ({"epochs": 1001}, "--epochs 1001 is too large: at most 1,000"),
        ({"alpha": 1.01}, "--alpha 1.01 is too large: at most 1"),
        ({"alpha": -1}, "--alpha -1.0 is too small: at least 0"),
        ({"alpha": float("nan")}, "--alpha nan is not a finite number: give one"),
        ({"alpha": float("-inf")}, "--alpha -inf is not a finite number: give one"),
        ({"alpha": "much"}, "option 'alpha' is 'much': expected a number"),
        ({"epochs": 2.0}, "option 'epochs' is 2.0: expected a whole number"),
        ({"epochs": True}, "option 'epochs' is True: expected a whole number"),
        ({"epochs": None}, "option 'epochs' is None: expected a whole number"),
        ({"dry": 1}, "option 'dry' is 1: expected true or false"),
        ({"folder": 3}, "option 'folder' is 3: expected a path"),
        ({"files": [3]}, "option 'files' is 3: expected a path"),
        ({"files": {"a": 1}}, "option 'files' is {'a': 1}: expected a path"),
        ({"folder": ""}, "option 'folder' is '': expected a path"),
        ({"folder": "a\0b"}, "option 'folder' is 'a\\x00b': expected a path"),
        ({"folder": ["a"]}, "option 'folder' is ['a']: expected a path"),
        ({"epochs": [1, 2]}, "option 'epochs' is [1, 2]: expected a whole number"),
        ({"epochs": {"a": 1}}, "option 'epochs' is {'a': 1}: expected a whole number"),
        ({"source": datetime.date(2020, 1, 2)}, "option 'source' is datetime.date(2020, 1, 2): expected a text"),
        ({"source": ["x"]}, "option 'source' is ['x']: expected a text"),
        ({"source": True}, "option 'source' is True: expected a text"),
        ({"alpha": 10**400}, f"option 'alpha' is 1{'0' * 56}...: expected a number"),
        ({"seed": 2**63}, "--seed 9223372036854775808 is too large: at most 9,223,372,036,854,775,807"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(**given)
    assert str(caught.value) == message


def test_limits_hold_without_from_dict_too() -> None:
    with pytest.raises(UsageError, match=r"^--epochs -1 is too small: at least 1$"):
        Sample("x", epochs=-1)
    with pytest.raises(UsageError, match="unknown balance"):
        dataclasses.replace(made(), balance="any")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().epochs = 1  # type: ignore[misc]


def test_some_settings_are_checked_without_the_others() -> None:
    assert Sample.checked({"files": ["a"], "alpha": 1}) == {"files": (Path("a"),), "alpha": 1.0}
    for values, message in (
        ({"epochs": 0}, "--epochs 0 is too small"),
        ({"balance": "clas"}, "unknown balance"),
        ({"x": 1}, "unknown option"),
    ):
        with pytest.raises(UsageError, match=message):
            Sample.checked(values)
