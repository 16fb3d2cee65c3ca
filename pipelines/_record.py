"""The record of a run, `runs/NAME.json`: the recipe as it was, and what became of each of its steps. `docs/formats.md`, "Run record".

It is written whole after every step, so that it tells of an interrupted run too. A new run of the same recipe replaces it; the record of
another text that had the name is kept beside it, as `NAME-` and the first 12 digits of that text's sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdprune_pipelines._recipes import Recipe

from kdprune_data.config import Config
from kdprune_data.errors import UsageError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import write_whole
from kdprune_data.formats.manifest import Manifest

RUNS = Path("runs")
FORMAT = 1
LEFT_OUT = ("recipe", "overwrite", "dry_run")
"""Options of a step that say nothing of what it made."""


class Record:
    """See the module's text."""

    def __init__(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Raises UsageError when something else stands under its name."""
        self.path = RUNS / f"{recipe.name}.json"
        self._started = time.monotonic()
        text = {"text": recipe.text, "sha256": hashlib.sha256(recipe.text.encode()).hexdigest()}
        self.facts: dict[str, Any] = {
            "format": FORMAT,
            "kind": "run",
            "name": recipe.name,
            "recipe": text,
            "overwrite": overwrite,
            "finished": False,
            "stages": [],
            "replaced": [],
        }
        self._before = _read(self.path)
        if overwrite and self._before and self._goes_on(self._before):
            self.facts["replaced"] = list(self._before["replaced"])

    def begin(self) -> None:
        """Take the name. What another recipe recorded under it is kept beside. Raises UsageError when there can be no folder."""
        if RUNS.exists() and not RUNS.is_dir():
            raise UsageError(f"{RUNS} is a file, and records of runs go to a folder of this name: move it away")
        RUNS.mkdir(exist_ok=True)
        before = self._before
        if before and before["recipe"]["sha256"] != self.facts["recipe"]["sha256"]:
            self.path.replace(RUNS / f"{self.path.stem}-{before['recipe']['sha256'][:12]}.json")
        self._write()

    def _goes_on(self, before: Mapping[str, Any]) -> bool:
        """Whether this run continues the one recorded before, which replaces and was interrupted."""
        return bool(before["overwrite"] and not before["finished"] and before["recipe"] == self.facts["recipe"])

    def replaced_already(self, title: str) -> bool:
        """Whether the interrupted runs that this one continues have made what the step makes: it is not to be replaced again."""
        done = [one for one in self.facts["replaced"] if one["section"] == title]
        return any((Path(one["folder"]) / m.NAME).is_file() and Manifest.read(Path(one["folder"])).digest == one["digest"] for one in done)

    def add(self, title: str, command: str, config: Config, **facts: Any) -> None:
        """Note a step that is done; facts: `folder`, `digest`, `made`, `seconds` and `result`."""
        self.facts["stages"].append({"section": title, "command": command, "options": options_of(config)} | facts)
        if self.facts["overwrite"] and facts["made"] and facts["folder"]:
            others = [one for one in self.facts["replaced"] if one["section"] != title]
            self.facts["replaced"] = [*others, {"section": title, "folder": facts["folder"], "digest": facts["digest"]}]
        self._write()

    def finish(self) -> None:
        """Note that the whole recipe is done."""
        self.facts["finished"] = True
        self._write()

    def _write(self) -> None:
        write_whole(self.path, m.canonical(self.facts | {"made": m.made(self._started)}), durable=bool(self.facts["finished"]))


def options_of(config: Config) -> dict[str, Any]:
    """Every option of a step as plain JSON: paths as texts."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in LEFT_OUT}
    return {key: [_plain(one) for one in value] if isinstance(value, tuple) else _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT or found["kind"] != "run" or not isinstance(found["recipe"]["sha256"], str):
            raise ValueError
        told = [one[key] for one in found["replaced"] for key in ("section", "folder", "digest")]
        if not all(isinstance(one, str) for one in told) or not all(isinstance(found[key], bool) for key in ("finished", "overwrite")):
            raise ValueError
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a run record of this version: move it away, or give your recipe another name") from None
