"""sources/patterns.py: braces, globs and folders become lists of files, in an order that can be foretold."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdprune_data.errors import UsageError
from kdprune_data.sources.patterns import MOST, expand


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten shards, a nested one, a hidden one, and names that look like patterns."""
    monkeypatch.chdir(tmp_path)
    for name in [*(f"s-{n:03d}.tar" for n in range(10)), "deep/er/x.tar", ".hidden.tar", "a[1].tar", "{1,2}.tar", "notes.txt"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (tmp_path / "s-folder.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ([], []),
        (["s-003.tar", "s-001.tar"], ["s-003.tar", "s-001.tar"]),
        (["s-{000..002}.tar"], ["s-000.tar", "s-001.tar", "s-002.tar"]),
        (["s-{002..000}.tar"], ["s-002.tar", "s-001.tar", "s-000.tar"]),
        (["s-{009,004}.tar"], ["s-009.tar", "s-004.tar"]),
        (["s-00[0-2].tar"], ["s-000.tar", "s-001.tar", "s-002.tar"]),
        (["s-00{7,3}*"], ["s-007.tar", "s-003.tar"]),
        (["s-*"], [f"s-{n:03d}.tar" for n in range(10)]),
        (["**/x.tar"], ["deep/er/x.tar"]),
        (["deep/er"], ["deep/er/x.tar"]),
        (["."], ["a[1].tar", *(f"s-{n:03d}.tar" for n in range(10)), "{1,2}.tar"]),
        (["a[1].tar", "{1,2}.tar"], ["a[1].tar", "{1,2}.tar"]),
    ],
)
def test_what_is_meant(texts: list[str], names: list[str]) -> None:
    assert [str(path) for path in expand(texts)] == names


def test_absolute_patterns(here: Path) -> None:
    assert expand([here / "s-*8.tar", f"{here}/s-{{000..001}}.tar"]) == [here / f"s-{n:03d}.tar" for n in (8, 0, 1)]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["no.tar"], "no such file: 'no.tar'; give files, a pattern in quotes, or a folder of .tar files"),
        (["x-*.tar"], "the pattern 'x-*.tar' matches no file: check the folder and the name"),
        (["s-{008..010}.tar"], "no such file: 's-010.tar' of 's-{008..010}.tar'"),
        (["{s,x}-*.tar"], "the pattern 'x-*.tar' matches no file"),
        (["s-f*"], "the pattern 's-f*' matches no file"),
        (["s-{000..009.tar"], "'s-{000..009.tar' has a brace without its other half"),
        (["deep"], "deep holds no .tar file"),
        (["s-001.tar", "s-00*.tar"], "s-001.tar is listed twice: name each file once"),
        (["s-001.tar", "deep/../s-001.tar"], "is listed twice (as s-001.tar): name each file once"),
        ([f"{{0..{MOST}}}"], f"names more than {MOST:,} files"),
        (["q-{0..99999999999}.tar"], f"names more than {MOST:,} files"),  # not written out first: that takes all memory
    ],
)
def test_patterns_that_mean_nothing(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(texts)
    assert says in str(caught.value)


def test_folders_of_other_files(here: Path) -> None:
    assert expand(["."], ".txt") == [Path("notes.txt")]


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "B.TAR.ZST"])
def test_compressed_tars_in_a_folder_are_not_left_out_silently(here: Path, name: str) -> None:
    (here / "mixed").mkdir()
    for one in ("a.tar", name):
        (here / "mixed" / one).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"holds compressed tars \('{name}'\), which would be left out: unpack them first"):
        expand([here / "mixed"])
