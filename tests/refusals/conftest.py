"""For the tables of bad inputs: how a refusal is checked, and real data to spoil."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdprune_data.formats import manifest as m

Member = tuple[str, bytes] | tarfile.TarInfo


def standing_in(folder: Path) -> dict[str, Any]:
    """Every path below a folder; of files their size and time too, so that nothing is written without being seen."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = None if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found


@pytest.fixture(scope="session")
def stands() -> Callable[[Path], dict[str, Any]]:
    """`standing_in`."""
    return standing_in


@pytest.fixture(scope="session")
def said_once() -> Callable[[Any, int, str], str]:
    """Check how a run was refused: the exit code, one `error:` line at the end, no traceback or warning, no stdout. Returns the line."""

    def check(ran: Any, code: int, said: str) -> str:
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert (ran.code, ran.out, len(errors)) == (code, "", 1), (ran.out, ran.err)
        assert ran.err.splitlines()[-1] == errors[0], ran.err
        assert not re.search(r"Traceback|Warning|Logging error|unexpected|report it", ran.err), ran.err
        assert re.search(said, errors[0]), errors[0]
        return errors[0]

    return check


@pytest.fixture(scope="session")
def refuses(kdprune: Callable[..., Any], said_once: Callable[[Any, int, str], str]) -> Callable[..., str]:
    """Run a command line that must be refused (see `said_once`) and leave the workspace as it was."""

    def run(workspace: Path, line: Sequence[object], code: int, said: str) -> str:
        before = standing_in(workspace)
        error = said_once(kdprune(*line, cwd=workspace), code, said)
        assert standing_in(workspace) == before
        return error

    return run


@pytest.fixture(scope="session")
def works(kdprune: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command line that must succeed and leave nothing unfinished."""

    def run(workspace: Path, *line: object) -> Any:
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
        assert not [path for path in standing_in(workspace) if re.search(r"\.partial|\.tmp$|\.replaced", path)]
        return ran

    return run


class Real:
    """Real digits as files of every kind."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self.labels: list[int] = data.target.tolist()
        self._pixels = np.floor(data.images * (255 / 16) + 0.5).astype(np.uint8)

    def image(self, n: int, form: str = "PNG", mode: str = "L", **more: Any) -> bytes:
        """A digit as a file, 16 pixels wide; `mode` as Pillow names it."""
        grey = Image.fromarray(self._pixels[n]).resize((16, 16))
        buffer = io.BytesIO()
        (grey.convert("I").convert("I;16") if mode == "I;16" else grey.convert(mode)).save(buffer, form, **more)
        return buffer.getvalue()

    def moving(self, form: str) -> bytes:
        """Two digits as frames of one file."""
        first, second = (Image.open(io.BytesIO(self.image(n))).convert("RGB") for n in (0, 1))
        buffer = io.BytesIO()
        first.save(buffer, form, save_all=True, append_images=[second])
        return buffer.getvalue()

    def folders(self, root: Path, n: int = 6, first: int = 0) -> Path:
        """Class folders of n digits."""
        for row in range(first, first + n):
            self.put(root / f"digit-{self.labels[row]}" / f"{row:04d}.png", self.image(row))
        return root

    @staticmethod
    def put(path: Path, data: bytes) -> Path:
        """A file, with the folders around it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def samples(self, n: int = 4, prefix: str = "") -> list[Member]:
        """The members of n samples, as webdataset names them."""
        found: list[Member] = []
        for row in range(n):
            found += [(f"{prefix}{row:04d}.png", self.image(row)), (f"{prefix}{row:04d}.cls", str(self.labels[row]).encode())]
        return found

    @staticmethod
    def tar(path: Path, members: Sequence[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
        """A tar of (name, bytes) or of headers alone."""
        with tarfile.open(path, "w", format=form) as file:
            for one in members:
                if isinstance(one, tarfile.TarInfo):
                    file.addfile(one)
                else:
                    info = tarfile.TarInfo(one[0])
                    info.size = len(one[1])
                    file.addfile(info, io.BytesIO(one[1]))
        return path

    def parquet(self, path: Path, labels: Any, images: Any = None) -> Path:
        """A Parquet file of digits with these labels."""
        rows = [self.image(n) for n in range(len(labels))] if images is None else images
        pq.write_table(pa.table({"image": pa.array(rows, pa.binary()), "label": labels}), path)
        return path

    @staticmethod
    def sign(folder: Path, **change: Any) -> None:
        """Change a manifest and make it true to itself again."""
        body = json.loads((folder / m.NAME).read_bytes())
        rest = {key: value for key, value in (body | change).items() if key != "sha256"}
        (folder / m.NAME).write_bytes(m.canonical(rest | {"sha256": m.sha256_json(rest)}))


@pytest.fixture(scope="session")
def real() -> Real:
    """See `Real`."""
    return Real()
