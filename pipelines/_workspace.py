"""Where things are, by convention: a workspace is a folder with `data/ teachers/ scores/ subsets/ logits/ students/` (and
`proxies/`, where `score --proxies` trains some, and `exports/`).

Each input a command needs is the one given, or the only candidate in its usual place, which is then named. Where there are several they are
listed and the option is asked for: nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdprune_pipelines._console import say

from kdprune_data.errors import UsageError
from kdprune_data.formats.manifest import NAME, PARTIAL, Manifest

DATA, TEACHERS, SCORES, SUBSETS, LOGITS, STUDENTS = (Path(p) for p in ("data", "teachers", "scores", "subsets", "logits", "students"))
PROXIES, EXPORTS = Path("proxies"), Path("exports")
MAKERS = {TEACHERS: "teacher", SCORES: "score", SUBSETS: "select", LOGITS: "cache", STUDENTS: "distill"}

Fits = Callable[[Manifest], bool]


def data(given: Path | None, split: str, option: str = "") -> Path:
    """The folder of a split: the one given, or `data/SPLIT`. Raises UsageError when there is none."""
    if given is not None:
        return given
    usual = DATA / split
    if not (usual / NAME).is_file():
        if (usual / PARTIAL).is_dir():
            raise UsageError(f"{usual} is unfinished: run the command that makes it again, it continues")
        option = option or f"--{split}"
        raise UsageError(f"no {usual} here: run `kdprune-data import SOURCE --split {split}` first, or give a folder with {option}")
    say(f"{split}: {usual}")
    return usual


def optional_data(given: Path | None, split: str) -> Path | None:
    """As `data`, but None where there is no such split."""
    return data(given, split) if given is not None or (DATA / split / NAME).is_file() else None


def one(given: Path | None, usual: Path, option: str, fits: Fits = lambda _: True) -> Path:
    """The input given, or the only fitting artefact in its usual place. Raises UsageError when there is none, or several."""
    if given is not None:
        return given
    found = candidates(usual, fits)
    what = usual.name.removesuffix("s") if usual != LOGITS else "logit cache"
    if not found:
        raise UsageError(f"no fitting {what} in {usual}/: run `kdprune-data {MAKERS[usual]}` first, or give a folder with {option}")
    if len(found) > 1:
        raise UsageError(f"several in {usual}/ fit: {', '.join(f.name for f in found)}; say which with {option} {usual}/NAME")
    say(f"{what}: {found[0]}")
    return found[0]


def candidates(usual: Path, fits: Fits = lambda _: True) -> list[Path]:
    """The finished, fitting artefacts in a usual place, by name; their files are checked when one of them is opened."""
    return [folder for folder in folders(usual) if fits(Manifest.read(folder))]


def folders(usual: Path) -> list[Path]:
    """The folders in a usual place that have a manifest, by name; nothing of them is checked."""
    return sorted(p.parent for p in usual.glob(f"*/{NAME}") if not p.parent.name.startswith(".")) if usual.is_dir() else []


def plain_name(name: str) -> None:
    """Raise UsageError for a `--name` that is none, or would lead out of its usual place."""
    if "/" in name or name.startswith("."):
        raise UsageError(f"--name {name!r} is not a plain name: no slash, no leading dot; use --out for a folder elsewhere")


def place(out: Path | None, name: str | None, usual: Path, derived: str) -> tuple[Path, str]:
    """(folder, name) of what is to be made: `--out` is the exact folder, `--name` a name in the usual place.

    Raises UsageError when both are given.
    """
    if out is not None and name is not None:
        raise UsageError("--out and --name were both given: --out is the exact folder, --name a name in its usual place; give one")
    if out is not None:
        return out, out.resolve().name
    chosen = name or derived
    return usual / chosen, chosen


def check_classes(split: str, folder: Path, classes: Sequence[str]) -> None:
    """Refuse a val or test split whose classes are not those of the train split beside it. Raises UsageError."""
    train = folder.parent / "train"
    if split == "train" or not (train / NAME).is_file():
        return
    wanted = list(Manifest.load(train, kinds=("dataset",)).classes)
    if list(classes) != wanted:
        own, lacking = sorted(set(classes) - set(wanted)), sorted(set(wanted) - set(classes))
        differs = (own or lacking)[:3] or ["their order"]
        raise UsageError(
            f"the classes of this {split} split are not those of {train}: {len(classes)} against {len(wanted)}, differing in "
            f"{', '.join(differs)}; use a source with the same classes (adopted shards: name them with --classes FILE)"
        )


def contents(described: Mapping[str, Any]) -> set[str]:
    """The contents of a data set (as an input's description) and of all data sets it was chosen from: what covers it."""
    return {described["content"]}.union(*(contents(i) for i in described["inputs"] if i["role"] == "data"))


def root_fraction(described: Mapping[str, Any]) -> float:
    """The fraction of the original data set that a data set or subset (as an input's description) keeps: 1 for a data set."""
    if described["kind"] != "subset":
        return 1.0
    parent = next(i for i in described["inputs"] if i["role"] == "data")
    return float(described["counts"]["kept"] / described["counts"]["candidates"]) * root_fraction(parent)
