"""What stands in a folder that somebody wants to write: nothing, an artefact finished or not, or what is none of ours; and its replacement.

An artefact that is replaced is first taken from its name at one stroke, to `.NAME.replaced` beside it; it is deleted when the new one is
sealed, and put back when the new one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from kdprune_data.errors import ExistsError, KdpruneError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.atomic import lock
from kdprune_data.formats.identity import Identity, ancestors, refuse_other
from kdprune_data.formats.manifest import PARTIAL, Manifest


def check_ours(folder: Path) -> None:
    """Raise ExistsError for a folder that holds anything but an artefact: nothing else is continued or replaced."""
    if file := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise ExistsError(f"{file} is a file, not a folder: choose another --out")
    if not _is_ours(folder) and folder.exists() and any(folder.iterdir()):
        raise ExistsError(f"{folder} holds files that are not an artefact: choose another --out, or empty it yourself")


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
    there = Manifest.load(folder)
    refuse_other(folder, Identity(there.kind, there.name, there.config, there.inputs).to_json(), identity.to_json())
    return there


def noted(folder: Path) -> dict[str, object] | None:
    """The identity of an unfinished run there, as JSON, or None."""
    note = folder / PARTIAL / "identity.json"
    if not note.exists():
        return None
    found: dict[str, object] = json.loads(note.read_bytes())
    return found


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
    shutil.rmtree(aside(folder), ignore_errors=True)
    folder.resolve().rename(aside(folder))


def put_back(folder: Path) -> None:
    """Undo `set_aside`, where it was done and the folder is gone."""
    if aside(folder).is_dir():
        aside(folder).rename(folder)
