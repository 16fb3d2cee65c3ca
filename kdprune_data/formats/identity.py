"""What an artefact is made of: two runs with one identity make the same thing, and a folder that holds another is refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprune_data.errors import ExistsError
from kdprune_data.formats import manifest as m


@dataclass(frozen=True)
class Identity:
    """What is being made: two runs with one identity make the same thing."""

    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As stored in `.partial/identity.json`; the name is a matter of the folder and does not enter."""
        inputs: dict[str, str] = {}
        for one in self.inputs:
            n = sum(role == one["role"] or role.startswith(f"{one['role']} ") for role in inputs)
            inputs[f"{one['role']} {n + 1}" if n else one["role"]] = one["digest"]  # of several with one role, each counts
        return {"kind": self.kind, "config": json.loads(m.canonical(self.config)), "inputs": inputs}


def ancestors(inputs: Sequence[Mapping[str, Any]]) -> set[str]:
    """The digests of inputs, of their inputs, and so on."""
    return {one["digest"] for one in inputs}.union(*(ancestors(one["inputs"]) for one in inputs))


def refuse_other(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], *, unfinished: bool = False) -> None:
    """Raise ExistsError, saying what differs and what name is free, unless two identities (as JSON) are one."""
    if there == wanted:
        return
    if there["kind"] != wanted["kind"]:
        there_kind, kind = (f"{'an' if one['kind'] == 'export' else 'a'} {one['kind']}" for one in (there, wanted))
        raise ExistsError(f"{folder} holds {there_kind}, not {kind}: choose another --out")
    inputs = [f"input {line}" for line in differences(there["inputs"], wanted["inputs"])]
    differs = differences(there["config"], wanted["config"]) + inputs
    shown = "; ".join(differs[:3]) + (f"; and {len(differs) - 3} more" if len(differs) > 3 else "")
    # A data set's own name is its split, and splits that belong together stand side by side: another goes beside all of them.
    split = wanted["kind"] == "dataset" and bool(folder.parent.name)
    taken = folder.parent if split else folder
    whole = taken.resolve()
    free = next(name for n in itertools.count(2) if not whole.with_name(name := f"{whole.name}-{n}").exists())
    elsewhere = f"--out {taken.with_name(free) / folder.name if split else taken.with_name(free)}"
    elsewhere = elsewhere if wanted["kind"] == "dataset" else f"--name {free}"
    what = "holds an unfinished run" if unfinished else "was made"
    raise ExistsError(f"{folder} {what} with other settings ({shown}): use {elsewhere} for another, or --overwrite to replace it")


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, a line each, for messages."""
    found = []
    for key in sorted(there.keys() | wanted.keys()):
        a, b = there.get(key), wanted.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{line}" for line in differences(a, b)]
        else:
            found.append(f"{key} is {_short(a)}, now {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:12] + "..."
