"""What stands in a folder that somebody wants to write: nothing, an artefact finished or not, or what is none of ours; and its replacement.

An artefact that is replaced is first taken from its name at one stroke, to `.NAME.replaced` beside it; it is deleted when the new one is
sealed, and put back when the new one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

from kdprune_data.errors import ExistsError, FormatError, KdpruneError, UsageError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import lock
from kdprune_data.formats.identity import Identity, ancestors, refuse_other
from kdprune_data.formats.manifest import PARTIAL, Manifest

LONGEST_NAME = 240
"""Bytes in a folder's name: file systems allow 255, and `.NAME.replaced` must fit as well."""


def check_name(folder: Path, identity: Identity) -> None:
    """Raise UsageError for a name that is too long, is not text, or does not fit on a line: before the work, not when it is sealed."""
    check_length(folder)
    try:
        identity.name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name {identity.name!r} is not UTF-8: choose another --name or --out") from None
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in folder.name):
        raise UsageError(f"the folder name {folder.name!r} holds a control character: choose another --name or --out")


def check_length(path: Path, what: str = "folder") -> None:
    """Raise UsageError where a name, or that of a folder around it, is too long."""
    for part in path.parts:
        size, limit = len(os.fsencode(part)), LONGEST_NAME if part == path.name else 255
        if size > limit:
            what = what if part == path.name else "folder"
            raise UsageError(f"the {what} name {part[:20]!r}... is {size:,} bytes long: at most {limit} fit; choose a shorter one")


def check_ours(folder: Path) -> None:
    """Raise ExistsError for a folder that holds anything but an artefact: nothing else is continued or replaced."""
    if file := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise ExistsError(f"{file} is a file, not a folder: choose another --out")
    if not _is_ours(folder) and folder.exists() and any(folder.iterdir()):
        raise ExistsError(f"{folder} holds files that are not an artefact: choose another --out, or empty it yourself")
    check_around(folder)


def check_around(path: Path) -> None:
    """Raise ExistsError for a path inside an artefact: nothing else stands there."""
    if around := next((p for p in path.absolute().parents if _is_ours(p)), None):
        raise ExistsError(f"{path} lies inside an artefact ({around}), which would hold a file too many: choose another --out")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is an artefact, finished or not, whole or damaged."""
    if (folder / PARTIAL).is_dir():
        return True
    try:
        return json.loads((folder / m.NAME).read_bytes())["kind"] in m.KINDS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finished(folder: Path, identity: Identity) -> Manifest | None:
    """The manifest of what stands finished in the folder, None where nothing does. Raises ExistsError when it is something else."""
    if not (folder / m.NAME).exists():
        return None
    try:
        there = Manifest.load(folder)
    except FormatError as error:
        raise FormatError(f"{error} (this command makes it again with --overwrite)") from None
    refuse_other(folder, Identity(there.kind, there.name, there.config, there.inputs).to_json(), identity.to_json())
    return there


def noted(folder: Path) -> dict[str, object] | None:
    """The identity of an unfinished run there, as JSON; None where there is none, or a power failure has torn it."""
    note = folder / PARTIAL / "identity.json"
    if not note.exists():
        return None
    try:
        found = json.loads(note.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() == {"kind", "config", "inputs"} else None


def is_to_replace(folder: Path, identity: Identity) -> bool:
    """Whether `--overwrite` has something to replace: this very thing, begun there and not finished, is continued and not begun again."""
    unfinished = not (folder / m.NAME).exists() and noted(folder) == identity.to_json()
    return folder.exists() and not unfinished


def check_replaceable(folder: Path, identity: Identity) -> None:
    """Refuse to replace what the new artefact is made from, an artefact of another kind, or the folder one stands in."""
    if folder.resolve() == Path.cwd():
        raise ExistsError(f"{folder} is the current folder: go elsewhere to replace it, or choose another --out")
    try:
        there = Manifest.load(folder)
    except KdpruneError:
        return  # unfinished or damaged: nothing is made from it
    if there.kind != identity.kind:
        raise ExistsError(f"{folder} is of kind {there.kind}, which --overwrite does not replace by {identity.kind}: choose another --out")
    if there.digest in ancestors(identity.inputs):
        raise ExistsError(f"{folder} is what this {identity.kind} is made from: choose another --out")


def aside(folder: Path) -> Path:
    """Where an artefact goes that is being replaced."""
    whole = folder.resolve()
    return whole.with_name(f".{whole.name}.replaced")


def set_aside(folder: Path) -> None:
    """Take an artefact from its name. Raises ExistsError while another process is writing it."""
    if (folder / PARTIAL).is_dir():
        os.close(lock(folder / PARTIAL))
    if aside(folder).is_dir() and not (folder / m.NAME).exists():
        remove(folder)  # a replacement that was interrupted: the artefact is still the one aside
        return
    shutil.rmtree(aside(folder), ignore_errors=True)
    folder.resolve().rename(aside(folder))


def remove(folder: Path) -> None:
    """Delete an unfinished artefact. Of what is left when this is interrupted nothing is trusted: its identity goes first."""
    (folder / PARTIAL / "identity.json").unlink(missing_ok=True)
    for path in [p for p in folder.glob("*") if p.name != PARTIAL]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo `set_aside`, where it was done and the folder is gone."""
    if aside(folder).is_dir():
        aside(folder).rename(folder)
