"""formats/build.py: an artefact appears whole or not at all; an interrupted one continues from the parts that are still what they were."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdprune_data.errors import ExistsError, FormatError, SourceError, UsageError
from kdprune_data.formats import manifest as m
from kdprune_data.formats.build import Build
from kdprune_data.formats.identity import Identity
from kdprune_data.formats.manifest import Manifest

CONFIG = {"seed": 0, "recipe": {"epochs": 3, "lr": 0.1}}


def identity(kind: str = "dataset", **config: Any) -> Identity:
    return Identity(kind, "x", CONFIG | config, [])


def finish(build: Build) -> Manifest:
    return build.seal(counts={"samples": 1}, classes=["a"], content="00" * 32)


def whole(folder: Path, **config: Any) -> Manifest:
    with Build.begin(folder, identity(**config)) as build:
        build.write("a.bin", b"aaa")
        build.write("sub/b.bin", b"bbb", {"rows": 3})
        return finish(build)


def refusal(folder: Path, wanted: Identity, **how: bool) -> str:
    with pytest.raises(ExistsError) as caught:
        Build.begin(folder, wanted, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_is_the_files_and_the_manifest(tmp_path: Path) -> None:
    made = whole(tmp_path / "x")
    assert {p.relative_to(tmp_path / "x").as_posix() for p in (tmp_path / "x").rglob("*") if p.is_file()} == {
        *("a.bin", "sub/b.bin", "log.txt", m.NAME)
    }
    assert Manifest.load(tmp_path / "x") == made
    assert [(f.path, f.bytes, f.sha256) for f in made.files] == [
        ("a.bin", 3, hashlib.sha256(b"aaa").hexdigest()),
        ("sub/b.bin", 3, hashlib.sha256(b"bbb").hexdigest()),
    ]


def test_a_file_may_be_written_in_any_order_and_is_hashed_in_its_own(tmp_path: Path) -> None:
    with Build.begin(tmp_path / "x", identity()) as build:
        with build.create("a.bin") as sink:
            sink.place(b"ccc", 4)
            sink.place(memoryview(b"aaaa"), 0)
            sink.count(b"aaaa")
            assert sink.tell() == 4
            sink.count(b"ccc")
        (made,) = build.files()
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"aaaaccc"
    assert (made.bytes, made.sha256) == (7, hashlib.sha256(b"aaaaccc").hexdigest())


def test_while_unfinished_the_folder_is_what_the_page_says(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with Build.begin(folder, identity()) as build:
        build.write("sub/b.bin", b"bbb", {"rows": 3})
        with build.create("c.bin") as sink:
            sink.write(b"cc")
            assert (folder / ".c.bin.tmp").exists()
            assert not (folder / "c.bin").exists()
    partial = folder / ".partial"
    assert json.loads((partial / "identity.json").read_bytes()) == {"kind": "dataset", "config": CONFIG, "inputs": {}}
    note = json.loads((partial / "parts" / "sub%2Fb.bin.json").read_bytes())
    assert note == {"path": "sub/b.bin", "bytes": 3, "sha256": hashlib.sha256(b"bbb").hexdigest(), "facts": {"rows": 3}}
    with pytest.raises(UsageError, match="is unfinished: run the command that makes it again, it continues"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (None, True),
        (b"bbx", False),  # a changed byte
        (b"bb", False),
        (b"bbbb", False),
        ("gone", False),
    ],
)
def test_a_finished_part_is_trusted_only_while_it_is_what_was_noted(tmp_path: Path, damage: bytes | str | None, kept: bool) -> None:
    with Build.begin(tmp_path / "x", identity()) as build:
        build.write("a.bin", b"aaa")
        build.write("sub/b.bin", b"bbb", {"rows": 3})
    path = tmp_path / "x" / "sub" / "b.bin"
    if damage == "gone":
        path.unlink()
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    with Build.begin(tmp_path / "x", identity()) as build:
        assert build.finished("a.bin") == {}
        assert build.finished("sub/b.bin") == ({"rows": 3} if kept else None)
        assert build.finished("c.bin") is None
        if not kept:
            build.write("sub/b.bin", b"bbb", {"rows": 3})
        found = finish(build)
    assert found.digest == whole(tmp_path / "fresh").digest


def test_an_error_while_a_file_is_written_leaves_no_file(tmp_path: Path) -> None:
    def half(build: Build) -> None:
        with build.create("a.bin") as sink:
            sink.write(b"half")
            raise RuntimeError

    with Build.begin(tmp_path / "x", identity()) as build:
        with pytest.raises(RuntimeError):
            half(build)
        assert build.finished("a.bin") is None
        assert [p.name for p in (tmp_path / "x").iterdir()] == [".partial"]


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize(("error", "stays"), [(SourceError, False), (UsageError, False), (KeyboardInterrupt, True), (OSError, False)])
def test_a_refusal_before_anything_was_made_leaves_nothing(tmp_path: Path, error: type[BaseException], stays: bool, parts: int) -> None:
    """What was refused is asked for differently next time; what was interrupted goes on."""

    def stopped() -> None:
        with Build.begin(tmp_path / "x", identity()) as build:
            for n in range(parts):
                build.write(f"{n}.bin", b"x")
            raise error

    with pytest.raises(error):
        stopped()
    assert (tmp_path / "x").exists() == (stays or parts > 0)


@pytest.mark.parametrize("error", [SourceError, OSError])
@pytest.mark.parametrize("around", ["a", "a/b", "."])
def test_folders_made_around_a_refusal_go_with_it(tmp_path: Path, error: type[Exception], around: str) -> None:
    """Those that were there before stay, and those that somebody put something in."""

    def stopped(*names: str) -> None:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(Build.begin(tmp_path / around / name, identity()))
            raise error

    with pytest.raises(error):
        stopped("x", "y")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir(exist_ok=True)
    with pytest.raises(error):
        stopped("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("n" * 241, "is 241 bytes long: at most 240 fit; choose a shorter one"),
        ("ü" * 121, "is 242 bytes long: at most 240 fit; choose a shorter one"),
        ("n" * 256 + "/x", "is 256 bytes long: at most 255 fit; choose a shorter one"),
        ("a\nb", "holds a control character: choose another --name or --out"),
        ("a\x7fb", "holds a control character"),
        ("a\u2028b", "holds a control character"),
    ],
)
def test_names_that_are_refused_before_the_work(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Build.begin(tmp_path / name, identity())
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_manifest_can_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the name 'b\\udce4' is not UTF-8: choose another --name or --out"):
        Build.begin(tmp_path / "x", replace(identity(), name="b\udce4"))


@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_made_inside_an_artefact(tmp_path: Path, finished: bool) -> None:
    with Build.begin(tmp_path / "x", identity()) as build:
        build.write("a.bin", b"a")
        if finished:
            build.seal(counts={}, classes=[], content="")
    with pytest.raises(
        ExistsError, match=r"x/y/z lies inside an artefact \(.*x\), which would hold a file too many: choose another --out$"
    ):
        Build.begin(tmp_path / "x" / "y" / "z", identity())


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    with Build.begin(tmp_path / "x", identity()) as build:
        (tmp_path / "x/.partial/log.txt").unlink()
        build.write("a.bin", b"a")
        build.seal(counts={}, classes=[], content="")
    assert Manifest.load(tmp_path / "x").files[0].path == "a.bin"


def test_the_log_holds_what_is_no_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Build.begin(tmp_path / "x", identity()):
        logging.getLogger("kdprune_data").warning("read %s", "b\udce4")
        assert "read b\\udce4" in (tmp_path / "x/.partial/log.txt").read_text()
    assert capfd.readouterr().err == ""


def test_a_refusal_while_adding_to_a_finished_one_leaves_it_as_it_was(tmp_path: Path) -> None:
    whole(tmp_path / "x")

    def stopped() -> None:
        with Build.begin(tmp_path / "x", identity(), append=True):
            raise SourceError

    with pytest.raises(SourceError):
        stopped()
    assert (tmp_path / "x" / "a.bin").exists()
    assert Manifest.load(tmp_path / "x").files


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    """A real kill -9, in the middle of a file, with the lock held."""
    program = """
        import os, signal, sys
        from pathlib import Path
        from kdprune_data.formats.build import Build
        from kdprune_data.formats.identity import Identity
        build = Build.begin(Path(sys.argv[1]), Identity("dataset", "x", {"seed": 0}, []))
        build.write("a.bin", b"aaa")
        with build.create("sub/b.bin") as sink:
            sink.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "x")], check=False)
    assert done.returncode == -9
    assert (tmp_path / "x" / "sub" / ".b.bin.tmp").exists()
    with Build.begin(tmp_path / "x", Identity("dataset", "x", {"seed": 0}, [])) as build:
        assert build.finished("a.bin") == {}
        assert build.finished("sub/b.bin") is None
        assert not list((tmp_path / "x").rglob("*.tmp"))


def test_the_same_again_is_done(tmp_path: Path) -> None:
    made = whole(tmp_path / "x")
    with Build.begin(tmp_path / "x", identity()) as build:
        assert build.done == made
    assert not (tmp_path / "x" / ".partial").exists()


def test_another_name_is_the_same_thing(tmp_path: Path) -> None:
    whole(tmp_path / "x")
    assert Build.begin(tmp_path / "x", Identity("dataset", "y", CONFIG, [])).done is not None


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (identity(seed=1), "(seed is 0, now 1)"),
        (identity(recipe={"epochs": 4, "lr": 0.1}), "(recipe.epochs is 3, now 4)"),
        (identity(recipe={"epochs": 4, "lr": 0.2}, seed=2), "(recipe.epochs is 3, now 4; recipe.lr is 0.1, now 0.2; seed is 0, now 2)"),
        (identity(more="x" * 50), "(more is null, now xxxxxxxxxxxx...)"),
        (identity(a=1, b=2, c=3, seed=4), "(a is null, now 1; b is null, now 2; c is null, now 3; and 1 more)"),
        (Identity("dataset", "x", CONFIG, [{"role": "data", "digest": "abcd"}]), "(input data is null, now abcd)"),
        (identity("subset"), "holds a dataset, not a subset: choose another --out"),
    ],
)
def test_something_else_is_refused_naming_what_differs(tmp_path: Path, wanted: Identity, says: str, finished: bool) -> None:
    if finished:
        whole(tmp_path / "x")
    else:
        Build.begin(tmp_path / "x", identity()).close()
    before = sorted(tmp_path.rglob("*"))
    line = refusal(tmp_path / "x", wanted)
    assert says in line
    assert ("unfinished" in line) == (not finished and wanted.kind == "dataset")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lock_is_let_go_when_a_run_is_refused(tmp_path: Path) -> None:
    Build.begin(tmp_path / "x", identity()).close()
    refusal(tmp_path / "x", identity(seed=1))
    with Build.begin(tmp_path / "x", identity()) as build:
        finish(build)


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_process_writes_at_a_time(tmp_path: Path, overwrite: bool) -> None:
    with Build.begin(tmp_path / "x", identity()) as first:
        first.write("a.bin", b"aaa")
        line = refusal(tmp_path / "x", identity(), overwrite=overwrite)
        assert line == f"another process is writing {tmp_path / 'x'}: wait for it, or choose another --out"
        assert finish(first).files[0].path == "a.bin"


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_replaces_all_of_it(tmp_path: Path, finished: bool) -> None:
    if finished:
        whole(tmp_path / "x")
    else:
        with Build.begin(tmp_path / "x", identity()) as build:
            build.write("a.bin", b"aaa")
    with Build.begin(tmp_path / "x", identity(seed=1), overwrite=True) as build:
        assert build.done is None
        build.write("c.bin", b"c")
        finish(build)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"c.bin", "log.txt", m.NAME}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_overwrite_of_a_damaged_artefact(tmp_path: Path) -> None:
    whole(tmp_path / "x")
    (tmp_path / "x" / "a.bin").unlink()
    with pytest.raises(FormatError, match="is missing"):
        Build.begin(tmp_path / "x", identity())
    assert Build.begin(tmp_path / "x", identity(), overwrite=True).done is None


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebodys_files_is_never_touched(tmp_path: Path, overwrite: bool, name: str) -> None:
    """A `manifest.json` may be anybody's: a browser extension's, for one."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_text('{"manifest_version": 3, "name": "mine"}')
    line = refusal(folder, identity(), overwrite=overwrite)
    assert line == f"{folder} holds files that are not an artefact: choose another --out, or empty it yourself"
    assert [p.name for p in folder.iterdir()] == [name]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert whole(tmp_path / "x").files


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExistsError, match=r"file is a file, not a folder: choose another --out$"):
        Build.begin(tmp_path / "file" / "x", identity())


def test_append_takes_a_finished_one_up_again(tmp_path: Path) -> None:
    first = whole(tmp_path / "x")
    with Build.begin(tmp_path / "x", identity(), append=True) as build:
        assert build.done is None
        assert build.finished("a.bin") == {}
        build.write("c.bin", b"c")
        grown = finish(build)
    assert [f.path for f in grown.files] == ["a.bin", "c.bin", "sub/b.bin"]
    assert [f for f in grown.files if f.path != "c.bin"] == list(first.files)
    refusal(tmp_path / "x", identity(seed=1), append=True)


def test_append_that_adds_nothing_leaves_it_as_it_was(tmp_path: Path) -> None:
    whole(tmp_path / "x")
    before = (tmp_path / "x" / m.NAME).read_bytes()
    with Build.begin(tmp_path / "x", identity(), append=True) as build:
        build.abandon()
    assert (tmp_path / "x" / m.NAME).read_bytes() == before
    assert not (tmp_path / "x" / ".partial").exists()


def test_side_files_stay_outside_the_digest(tmp_path: Path) -> None:
    def made(name: str, note: bytes) -> Manifest:
        with Build.begin(tmp_path / name, identity()) as build:
            build.write("a.bin", b"aaa")
            build.write("README.md", note)
            return build.seal(counts={}, classes=[], content="00" * 32, side=["README.md", "absent.txt"])

    one, other = made("one", b"1"), made("other", b"2")
    assert one.digest == other.digest
    assert [f.path for f in one.files] == ["a.bin"]
    assert [f.path for f in one.side] == ["README.md", "log.txt"]


def test_a_sink_hashes_what_is_written(tmp_path: Path) -> None:
    build = Build.begin(tmp_path / "x", identity())
    with build, build.create("a.bin") as sink:
        assert sink.write(memoryview(b"abcdef")[1:3]) == 2
        assert sink.write(b"") == 0
        assert sink.tell() == 2
    shutil.move(tmp_path / "x" / "a.bin", tmp_path / "a.bin")
    assert build.files()[0].sha256 == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    assert os.path.getsize(tmp_path / "a.bin") == 2  # noqa: PTH202


def test_overwrite_never_takes_what_the_new_one_is_made_from(tmp_path: Path) -> None:
    parent = whole(tmp_path / "x")
    child = Identity("dataset", "y", CONFIG | {"seed": 1}, [parent.as_input("data")])
    grandchild = Identity("dataset", "z", CONFIG, [{**parent.as_input("data"), "digest": "0" * 64, "inputs": [parent.as_input("data")]}])
    for wanted in (child, grandchild):
        assert "is what this dataset is made from" in refusal(tmp_path / "x", wanted, overwrite=True)
    assert "is of kind dataset, which --overwrite does not replace by scores" in refusal(tmp_path / "x", identity("scores"), overwrite=True)
    assert Manifest.load(tmp_path / "x") == parent


def test_overwrite_of_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    assert "is the current folder" in refusal(Path(), identity(seed=1), overwrite=True)


def test_a_refused_replacement_puts_the_old_one_back(tmp_path: Path) -> None:
    there = whole(tmp_path / "x")
    with pytest.raises(SourceError), Build.begin(tmp_path / "x", identity(seed=1), overwrite=True) as build:
        build.write("a.bin", b"new")
        raise SourceError("an image that does not decode")
    assert Manifest.load(tmp_path / "x") == there
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_interrupted_replacement_continues_and_then_the_old_one_is_gone(tmp_path: Path) -> None:
    whole(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), Build.begin(tmp_path / "x", identity(seed=1), overwrite=True) as build:
        build.write("a.bin", b"new")
        raise KeyboardInterrupt
    with Build.begin(tmp_path / "x", identity(seed=1), overwrite=True) as build:
        assert build.finished("a.bin") == {}
        finish(build)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_scratch_that_a_run_can_continue_from_outlives_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(SourceError), Build.begin(tmp_path / "x", identity()) as build:
        build.write_scratch("state", b"an hour of training")
        raise SourceError("a shard was changed")
    with Build.begin(tmp_path / "x", identity()) as build:
        assert build.scratch("state").read_bytes() == b"an hour of training"


@pytest.mark.parametrize("finished", [True, False])
def test_a_link_is_followed_and_not_replaced(tmp_path: Path, finished: bool) -> None:
    (tmp_path / "real").mkdir()
    if finished:
        whole(tmp_path / "real" / "x")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    with Build.begin(tmp_path / "link", identity(seed=1), overwrite=True) as build:
        build.write("c.bin", b"ccc")
        made = finish(build)
    assert (tmp_path / "link").is_symlink()
    assert Manifest.load(tmp_path / "real" / "x") == made
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["x"]


def test_finished_by_another_between_the_look_and_the_lock(tmp_path: Path) -> None:
    """Staged: the first half of `begin` has found nothing there."""
    late = Build(tmp_path / "x", identity())
    there = whole(tmp_path / "x")
    with pytest.raises(ExistsError, match=r"another process has just finished .*: run the same command again"):
        late._open(None)
    late.discard()
    assert Manifest.load(tmp_path / "x") == there
