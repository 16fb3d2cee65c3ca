"""Settings: frozen dataclasses whose fields carry their own help, choices and limits.

A command's options, its section of `kdprune.toml` and its Python API are one dataclass. `Config.from_dict` is the only way in from text:
an unknown key is an error that suggests the nearest known one, and every value is checked against its field.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, Self

from kdprune_data.errors import UsageError, unknown


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    argument: bool = False,
    short: str | None = None,
) -> Any:
    """A field of a Config. `least` and `most` are inclusive; `argument` makes it positional on the command line."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "argument": argument, "short": short}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Base of all settings; subclasses are frozen dataclasses made of `option` fields."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values (TOML, the command line): lists become tuples, text becomes paths.

        Raises UsageError for an unknown key, a value of the wrong type, outside its choices or its limits.
        """
        types_of = field_types(cls)
        for key in values:
            if key not in types_of:
                raise unknown("option", key, types_of)
        return cls(**{key: _coerce(key, value, types_of[key]) for key, value in values.items()})


def field_types(cls: type[Config]) -> dict[str, tuple[type, bool, bool]]:
    """Each field's (plain type, may be None, is a tuple of that type)."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        parts = [p for p in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if p is not type(None)]
        optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
        many = typing.get_origin(parts[0]) is tuple
        found[name] = (typing.get_args(parts[0])[0] if many else parts[0], optional, many)
    return found


def _coerce(key: str, value: Any, kind: tuple[type, bool, bool]) -> Any:
    plain, optional, many = kind
    if value is None and optional:
        return None
    if many:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = (value,)
        return tuple(_coerce(key, item, (plain, False, False)) for item in value)
    if plain is Path and isinstance(value, str):
        return Path(value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise UsageError(f"option {key!r} is {value!r}: expected {plain.__name__}")
    return value


def _check(field: Field[Any], value: Any) -> None:
    limits = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if limits.get("choices") and item not in limits["choices"]:
            raise unknown(field.name.replace("_", "-"), str(item), limits["choices"])
        if isinstance(item, float) and not math.isfinite(item):
            raise UsageError(f"--{field.name.replace('_', '-')} {item} is not a finite number: give one")
        if limits.get("least") is not None and item < limits["least"]:
            raise UsageError(f"--{field.name.replace('_', '-')} {item} is too small: at least {limits['least']:,}")
        if limits.get("most") is not None and item > limits["most"]:
            raise UsageError(f"--{field.name.replace('_', '-')} {item} is too large: at most {limits['most']:,}")
