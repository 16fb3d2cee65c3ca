"""Runs command lines where there is no room, or nothing may be written: in a mount namespace of its own, so that nothing is left mounted.

`unshare -m python rooms.py WORKSPACE`; on stdin a JSON list of `{"line", "share"}`: a command line without its `--out`, and the share
of what it needs that the disk has (null: all, but read-only). On stdout a JSON list of what happened: `plain` (elsewhere, undisturbed),
`full`, `left` (the paths that stand then), `again` (the same with room), and the digests of both artefacts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdprune_cli.main import call

ROOM = Path("room")


def run(line: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(line)
    return code, out.getvalue(), err.getvalue()


def mount(*options: str) -> None:
    """Mount an empty disk at ROOM, or change the one there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(ROOM)], check=True)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file; of the manifest, the digest it states."""
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}
    return found | {"log.txt": "", "manifest.json": json.loads((folder / "manifest.json").read_bytes())["digest"]}


def case(number: int, line: list[str], share: float | None) -> dict[str, Any]:
    """One command line; see the module's text."""
    plain, there = Path(f"plain-{number}/made"), ROOM / "made"
    found: dict[str, Any] = {"plain": run([*line, "--out", str(plain)])}
    needed = sum(p.stat().st_size for p in plain.rglob("*") if p.is_file())
    mount("size=64m" if share is None else f"size={max(4096, int(needed * share))}")
    if share is None:
        mount("remount", "ro")
    found["full"] = run([*line, "--out", str(there)])
    found["left"] = sorted(str(p.relative_to(ROOM)) for p in ROOM.rglob("*"))
    mount("remount", "rw", "size=64m")
    found["again"] = run([*line, "--out", str(there)])
    found["wanted"], found["made"] = digests(plain), digests(there)
    if share is None:
        mount("remount", "ro")
        found["done"] = run([*line, "--out", str(there)])
        found["verified"] = run(["verify", str(there)])
    subprocess.run(["umount", "--lazy", str(ROOM)], check=True)  # files that were mapped may stand open still
    return found


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    ROOM.mkdir()
    print(json.dumps([case(n, **one) for n, one in enumerate(json.load(sys.stdin))]))
