"""Settings: frozen dataclasses whose fields carry their own help, choices and limits.

A command's options, its section of `kdprune.toml` and its Python API are one dataclass. `Config.from_dict` is the only way in from text:
an unknown key is an error that suggests the nearest known one, and every value is checked against its field.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, Self

from kdprune_data.errors import UsageError, unknown

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
"""What a value should be, for messages."""
WHOLE_MOST = 2**63 - 1
"""The largest whole number of any option: 64 bits, as everywhere in the files."""


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    argument: bool = False,
    short: str | None = None,
    values: str | None = None,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """A field of a Config. `least` and `most` are inclusive; `argument` makes it positional on the command line; `values` names what a
    tuple of a fixed length is given as, all at once (`LOW HIGH`); `check` raises UsageError for a value that cannot be."""
    limits = {"choices": choices, "least": least, "most": most, "values": values, "check": check}
    return dataclasses.field(default=default, metadata={"help": help, "argument": argument, "short": short} | limits)


@dataclass(frozen=True)
class Config:
    """Base of all settings; subclasses are frozen dataclasses made of `option` fields. A field `from_` is the option `from`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name), self.shown)

    @staticmethod
    def shown(name: str) -> str:
        """How messages spell an option."""
        return f"--{name.rstrip('_').replace('_', '-')}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values (TOML, the command line): lists become tuples, text becomes paths.

        Raises UsageError for an unknown key, a value of the wrong type, outside its choices or its limits.
        """
        return cls(**cls.checked(values))

    @classmethod
    def field_of(cls, key: str, what: str = "option") -> str:
        """The field of an option by its name in plain values: `from_` of `from`. Raises UsageError where there is none of `what`."""
        types_of = field_types(cls)
        found = key if key in types_of or f"{key}_" not in types_of else f"{key}_"
        if found not in types_of:
            raise unknown(what, key, [name.rstrip("_") for name in types_of])
        return found

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Some settings from plain values, each checked by itself: for files that give a part of them. Raises as `from_dict` does."""
        types_of, fields = field_types(cls), {field.name: field for field in dataclasses.fields(cls)}
        values = {cls.field_of(key): value for key, value in values.items()}
        found = {key: _coerce(key, value, types_of[key]) for key, value in values.items()}
        for key, value in found.items():
            _check(fields[key], value, cls.shown)
        return found


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
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(key, item, (plain, False, False)) for item in items)
    if plain is Path and isinstance(value, str):
        return _path(key, value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= WHOLE_MOST:
        return float(value)
    if plain is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise UsageError(f"option {key!r} is {_shown(value)}: expected {WORDS.get(plain, plain.__name__)}")
    return value


def _path(key: str, text: str) -> Path:
    if not text or "\0" in text:
        raise UsageError(f"option {key!r} is {text!r}: expected a path")
    return Path(text)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _check(field: Field[Any], value: Any, shown: Callable[[str], str]) -> None:
    limits, name = field.metadata, shown(field.name)
    if limits.get("values") and value and len(value) != len(limits["values"].split()):
        raise UsageError(f"option {field.name!r} is {_shown(list(value))}: expected {len(limits['values'].split())} ({limits['values']})")
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if item == "":
            raise UsageError(f"{field.name.upper() if limits['argument'] else name} is empty: give a value, or leave it out")
        if limits.get("choices") and item not in limits["choices"]:
            raise unknown(name.removeprefix("--").replace("set ", "setting "), str(item), limits["choices"])
        if isinstance(item, float) and not math.isfinite(item):
            raise UsageError(f"{name} {item} is not a finite number: give one")
        if limits.get("least") is not None and item < limits["least"]:
            raise UsageError(f"{name} {item} is too small: at least {limits['least']:,}")
        most = limits["most"] if limits.get("most") is not None else WHOLE_MOST if isinstance(item, int) else None
        if most is not None and item > most:
            raise UsageError(f"{name} {item} is too large: at most {most:,}")
        if limits.get("check"):
            limits["check"](item)


@dataclass(frozen=True)
class Settings(Config):
    """Settings of one method or score, given as `--set name=value`."""

    @staticmethod
    def shown(name: str) -> str:
        """How messages spell a setting."""
        return f"--set {name}"

    @classmethod
    def parse(cls, of: str, given: Mapping[str, str], **others: Any) -> Self:
        """Settings from texts, each read as its field's type; `others` are given as they are. `of`: whose they are, for messages.

        Raises UsageError for a name that `of` has not, or a text that is no such value.
        """
        types_of = {name: kind for name, kind in field_types(cls).items() if name not in others}
        for name in given:
            if name not in types_of:
                raise (
                    unknown(f"setting of {of}", name, types_of) if types_of else UsageError(f"{of} has no settings: leave out --set {name}")
                )
        return cls(**{name: _read(name, text, types_of[name]) for name, text in given.items()}, **others)

    def own(self) -> dict[str, Any]:
        """The values, by name, as a manifest keeps them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """`name=value` texts as a mapping. Raises UsageError for one that is none, or a name that is given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals):
            raise UsageError(f"--set {text} is no setting: give name=value")
        if name in found:
            raise UsageError(f"--set {name} was given twice ({found[name]} and {value}): give it once")
        found[name] = value.strip()
    return found


def _read(name: str, text: str, kind: tuple[type, bool, bool]) -> Any:
    """A text as a value of a field's type; `auto` is None where that may be."""
    plain, optional, _ = kind
    if optional and text == "auto":
        return None
    if plain is bool and text in ("true", "false"):
        return text == "true"
    if plain is str:
        return text
    try:
        if plain in (int, float):
            return plain(text)
    except ValueError:
        pass
    raise UsageError(f"--set {name}={text}: expected {WORDS[plain]}" + (", or auto" if optional else ""))
