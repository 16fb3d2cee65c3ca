"""Files named by patterns: braces with a range or a list, globs in quotes, folders; so that a thousand shards are one word.

`shard-{000000..000999}.tar` is a list of names, each of which must exist, in that order; `shards/*.tar` is what stands there, sorted; a
folder is its files of one suffix, sorted.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from kdprune_data.errors import UsageError, some

MAGIC = "*?["
MOST = 1_000_000
PACKED = re.compile(r"\.(tgz|tar\.(gz|xz|bz2|zst|lz4))$", re.IGNORECASE)
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def expand(texts: Iterable[str | Path], suffix: str = ".tar") -> list[Path]:
    """The files that the texts name, in their order. `suffix`: of the files that a folder stands for.

    Raises UsageError for a pattern that matches nothing, a file that does not exist, and a file named twice.
    """
    found = [path for text in texts for path in _one(str(text), suffix)]
    seen: dict[Path, Path] = {}
    for path in found:
        whole = path.resolve()
        if whole in seen:
            same = "" if str(seen[whole]) == str(path) else f" (as {seen[whole]})"
            raise UsageError(f"{path} is listed twice{same}: name each file once")
        seen[whole] = path
    return found


def _one(text: str, suffix: str) -> list[Path]:
    if Path(text).is_file():  # a name may hold braces and stars
        return [Path(text)]
    if Path(text).is_dir():
        return _in_folder(Path(text), suffix)
    _check_ranges(text)
    try:
        names = list(islice(braceexpand(text), MOST + 1)) if "{" in text else [text]
    except ValueError:  # UnbalancedBracesError, of which the package's type stubs do not tell
        raise UsageError(f"{text!r} has a brace without its other half: write NAME-{{000..009}}{suffix}, in quotes") from None
    if len(names) > MOST:
        raise _too_many(text)
    globbed = [(name, [name] if not _is_glob(name) else _matching(name)) for name in names]
    empty = [name for name, files in globbed if not files]
    if empty:
        raise UsageError(f"the pattern {some(empty)} matches no file: check the folder and the name")
    paths = [Path(file) for _, files in globbed for file in files if not (_is_glob(text) and Path(file).is_dir())]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        of = f" of {text!r}" if len(names) > 1 else ""
        raise UsageError(f"no such file: {some(missing)}{of}; give files, a pattern in quotes, or a folder of {suffix} files")
    if not paths:
        raise UsageError(f"the pattern {text!r} matches no file: check the folder and the name")
    return paths


def _check_ranges(text: str) -> None:
    """Refuse a range of too many numbers before it is written out, which takes memory for all of them."""
    for first, last in RANGE.findall(text):
        if abs(int(last) - int(first)) >= MOST:
            raise _too_many(text)


def _too_many(text: str) -> UsageError:
    return UsageError(f"{text!r} names more than {MOST:,} files: at most so many; check the range in its braces")


def _is_glob(text: str) -> bool:
    return any(c in text for c in MAGIC)


def _matching(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _in_folder(folder: Path, suffix: str) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix == suffix and p.is_file() and not p.name.startswith("."))
    if packed := sorted(p.name for p in folder.iterdir() if PACKED.search(p.name) and suffix == ".tar"):
        raise UsageError(
            f"{folder} holds compressed tars ({some(packed)}), which would be left out: unpack them first, shards are plain tars"
        )
    if not found:
        raise UsageError(f"{folder} holds no {suffix} file: give the files themselves, or the folder they are in")
    return found
