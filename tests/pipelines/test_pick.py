"""pipelines/pick.py: what is kept of a table is what `select` keeps of a data set with these ids, labels and scores."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kdprune_pipelines import info, pick, select
from kdprune_pipelines._console import Outcome

from kdprune_data import order
from kdprune_data.errors import ExistsError, KdpruneError, SourceError, UsageError
from kdprune_data.formats import listed, rows


@pytest.fixture(scope="module")
def train(digits: Path) -> Path:
    return digits / "data" / "train"


@pytest.fixture(scope="module")
def table(train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training digits as somebody's table, in another order and in several row groups: id, label, two scores."""
    index = pq.read_table(train / "index.parquet")
    rng = np.random.default_rng(0)
    scores = {"spread": rng.normal(size=len(index)).astype(np.float32), "few": rng.poisson(2, len(index)) - 1}
    found = pa.table({"id": index["id"], "label": index["label"], **scores})
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    pq.write_table(found.take(rng.permutation(len(found))), path, row_group_size=200)
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several pieces, and several parts."""
    monkeypatch.setattr(rows, "PIECE", 128)
    monkeypatch.setattr(rows, "PART", 300)


def run(*tables: Path, out: Path, **settings: Any) -> Outcome:
    return pick.run(pick.PickConfig.from_dict({"tables": tables, "frac": "0.3", "out": out} | settings))


def refusal(kind: type[KdpruneError], *tables: Path, out: Path, **settings: Any) -> str:
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(kind) as caught:
        run(*tables, out=out, **settings)
    assert "\n" not in str(caught.value)
    assert (out.read_bytes() if out.is_file() else None) == before
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".tmp")]
    return str(caught.value)


def ids(path: Path) -> list[str]:
    return list(map(str, pq.read_table(path)["id"].to_pylist()))


def changed(path: Path, out: Path, **columns: Any) -> Path:
    """The table with other columns; None drops one."""
    found = pq.read_table(path)
    for name, values in columns.items():
        found = found.drop_columns([name]) if name in found.column_names else found
        found = found if values is None else found.append_column(name, values)
    pq.write_table(found, out, row_group_size=200)
    return out


# --- what is kept


@pytest.mark.parametrize("balance", ["class", "uniform", "none"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"column": "spread", "hard": "high"},
        {"column": "spread", "hard": "high", "keep": "middle"},
        *({"column": "few", "hard": hard, "keep": keep} for hard in ("high", "low") for keep in ("hard", "easy", "middle")),
        {"column": "few", "hard": "high", "skip_hardest": 0.15},
        {"column": "few", "hard": "low", "skip_hardest": 0.3, "keep": "easy"},
    ],
    ids=str,
)
def test_as_select_keeps(train: Path, table: Path, tmp_path: Path, how: dict[str, Any], balance: str) -> None:
    settings = {"frac": "0.23", "balance": balance, "seed": 3} | how
    scores = {"scores": table} if "column" in how else {}
    select.run(select.SelectConfig.from_dict({"data": train, "out": tmp_path / "subset", "ids_only": True} | settings | scores))
    found = run(table, out=tmp_path / "list.parquet", **settings)
    kept = ids(tmp_path / "list.parquet")
    assert {*kept} == {*ids(tmp_path / "subset" / "selection.parquet")}
    assert found.facts["counts"]["kept"] == len(kept) == len({*kept})
    assert kept == [one for one in ids(table) if one in {*kept}]  # in the order of the table


def test_of_what_it_writes(table: Path, tmp_path: Path) -> None:
    """Columns, types, values, metadata; and `select --keys` takes it."""
    out = tmp_path / "list.parquet"
    run(table, out=out, column="few", hard="high")
    found, whole = pq.read_table(out), pq.read_table(table)
    assert found.schema.names == ["id", "label", "score"]
    assert found.schema.types == [pa.string(), pa.int32(), pa.int64()]
    assert found.schema.field("score").metadata == {b"hard": b"high"}
    known = {one["id"]: (one["label"], one["few"]) for one in whole.to_pylist()}
    assert all(known[one["id"]] == (one["label"], one["score"]) for one in found.to_pylist())
    facts = listed.read_facts(out)
    assert facts is not None
    assert facts.config == {"balance": "class", "frac": "0.3", "hard": "high", "keep": "hard", "method": "few", "seed": 0}
    assert [(one["name"], one["rows"]) for one in facts.inputs] == [("table.parquet", len(whole))]
    assert facts.counts["kept"] == len(found)


def test_info_tells_of_a_list(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.parquet"
    run(table, out=out, column="few", hard="high")
    told = info.run(info.InfoConfig(out))
    assert told.facts["kind"] == "list"
    assert told.facts["config"]["method"] == "few"
    assert "  settings  balance = class\n" in told.text
    assert "    table.parquet: 1,294 rows, " in told.text
    with pytest.raises(UsageError, match="is a file: give the folder it stands in"):
        info.run(info.InfoConfig(table))


def test_a_list_is_for_select(train: Path, table: Path, tmp_path: Path) -> None:
    run(table, out=tmp_path / "list.parquet")
    select.run(select.SelectConfig.from_dict({"data": train, "out": tmp_path / "subset", "keys": tmp_path / "list.parquet"}))
    assert {*ids(tmp_path / "subset" / "selection.parquet")} == {*ids(tmp_path / "list.parquet")}


@pytest.mark.parametrize("column", [None, "few"])
def test_the_same_from_any_files_and_threads(table: Path, tmp_path: Path, column: str | None) -> None:
    """One file, two, a folder of them, one thread or three: the same rows, and from one file the same bytes."""
    whole, folder = pq.read_table(table), tmp_path / "parts"
    folder.mkdir()
    for at, one in enumerate((whole.slice(0, 777), whole.slice(777, 0), whole.slice(777))):
        pq.write_table(one, folder / f"{at}.parquet", row_group_size=61)
    how = {"column": column, "hard": "low"} if column else {}
    for name, tables, jobs in (("a", [table], 1), ("b", [table], 3), ("c", [folder], 2), ("d", sorted(folder.iterdir()), 2)):
        run(*tables, out=tmp_path / f"{name}.parquet", jobs=jobs, **how)
    made = {name: tmp_path / f"{name}.parquet" for name in "abcd"}
    assert made["a"].read_bytes() == made["b"].read_bytes()
    assert ids(made["a"]) == ids(made["c"]) == ids(made["d"])


@pytest.mark.parametrize("column", [None, "few"])
def test_uids_that_stand_in_the_table_are_used(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str | None) -> None:
    """Ours save the hashing; what somebody else calls so is not read."""
    how = {"column": column, "hard": "low"} if column else {}
    run(table, out=tmp_path / "plain.parquet", **how)
    ours = pa.array(order.uids_of(ids(table)))
    others = changed(table, tmp_path / "others.parquet", uid=pa.array(np.arange(len(ours), dtype=np.uint64)))
    run(others, out=tmp_path / "b.parquet", **how)
    with_uids = changed(table, tmp_path / "uids.parquet", uid=ours)
    monkeypatch.setattr("kdprune_data.formats.blake.uids", None)
    run(with_uids, out=tmp_path / "c.parquet", **how)
    without_ids = changed(table, tmp_path / "nameless.parquet", uid=ours, id=None)
    run(without_ids, out=tmp_path / "d.parquet", **how)
    assert ids(tmp_path / "plain.parquet") == ids(tmp_path / "b.parquet") == ids(tmp_path / "c.parquet")
    assert pq.read_table(tmp_path / "d.parquet")["uid"].to_pylist() == order.uids_of(ids(tmp_path / "plain.parquet")).tolist()


def test_scores_folders_and_indexes_are_tables(scored: Path, tmp_path: Path) -> None:
    """Our own: a scores folder as `select` reads it, and an index, whose rows that are not `ok` are passed over."""
    folder = next((scored / "scores").iterdir())
    run(folder, out=tmp_path / "scores.parquet", column="el2n")
    out = tmp_path / "subset"
    select.run(
        select.SelectConfig.from_dict({"data": scored / "data/train", "out": out, "frac": "0.3", "method": "el2n", "scores": folder})
    )
    assert ids(tmp_path / "scores.parquet") == ids(out / "selection.parquet")
    index = pq.read_table(scored / "data/train/index.parquet")
    ok = np.arange(len(index)) % 3 > 0
    some = index.drop_columns(["ok"]).append_column("ok", pa.array(ok))
    pq.write_table(some, tmp_path / "index.parquet")
    pq.write_table(index.filter(pa.array(ok)).drop_columns(["ok", "uid"]), tmp_path / "left.parquet")
    for name in ("index", "left"):
        run(tmp_path / f"{name}.parquet", out=tmp_path / f"{name}-list.parquet")
    assert ids(tmp_path / "index-list.parquet") == ids(tmp_path / "left-list.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_other_kinds_of_columns(table: Path, tmp_path: Path, kind: pa.DataType) -> None:
    """Texts that arrow holds otherwise, wide and narrow numbers."""
    whole = pq.read_table(table)
    other = changed(
        table,
        tmp_path / "other.parquet",
        id=whole["id"].cast(kind),
        label=whole["label"].cast(pa.uint8()),
        few=whole["few"].cast(pa.float64()),
    )
    for name, path in (("a", table), ("b", other)):
        run(path, out=tmp_path / f"{name}.parquet", column="few", hard="high")
    assert ids(tmp_path / "a.parquet") == ids(tmp_path / "b.parquet")


# --- again, otherwise, not at all


def test_again(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same says so; other settings or another table are refused, or replace it when they are asked to; the dry run touches nothing."""
    out = tmp_path / "deep" / "list.parquet"
    first = run(table, out=out)
    before = out.read_bytes()
    assert run(table, out=out).facts == first.facts
    assert "already done" in capsys.readouterr().err
    assert "nothing would be done" in run(table, out=out, dry_run=True).text
    assert "made with other settings (frac is 0.3, now 0.4): use another --out" in refusal(ExistsError, table, out=out, frac="0.4")
    other = changed(table, tmp_path / "table.parquet", few=None)
    assert "(other files)" in refusal(ExistsError, other, out=out)
    told = run(table, out=out, frac="0.4", overwrite=True, dry_run=True)
    assert told.facts["state"] == "replaced"
    assert out.read_bytes() == before
    run(table, out=out, frac="0.4", overwrite=True)
    assert len(ids(out)) == told.facts["counts"]["row"]
    out.write_bytes(before[:-1])
    assert "is no list that this command made" in refusal(ExistsError, table, out=out, overwrite=True)


@pytest.mark.parametrize("column", [None, "spread"])
def test_a_dry_run_tells_about_as_much(table: Path, tmp_path: Path, column: str | None) -> None:
    how = {"column": column, "hard": "low"} if column else {}
    told = run(table, out=tmp_path / "list.parquet", dry_run=True, **how)
    assert list(tmp_path.iterdir()) == []
    made = run(table, out=tmp_path / "list.parquet", **how)
    assert told.facts["file"] == made.facts["file"]
    assert told.facts["bytes"] == pytest.approx(made.facts["bytes"], rel=0.4)


REFUSED: list[tuple[type[KdpruneError], dict[str, Any], dict[str, Any], str]] = [
    (UsageError, {}, {"column": "fwe"}, r"has no column 'fwe': it has id, label, spread, few"),
    (UsageError, {}, {"column": "few"}, r"which end of column 'few' is the hard one\? say --hard high or --hard low"),
    (UsageError, {}, {"column": "random"}, r"--column random has the name of something else"),
    (UsageError, {}, {"hard": "high"}, r"--hard high is for a score, and none ranks here: name its column with --column"),
    (UsageError, {}, {"skip_hardest": 0.5}, r"--skip-hardest 0.5 is for a score"),
    (UsageError, {}, {"frac": "1e-9"}, r"--frac 1E-9 of 1,294 rows keeps none: at least 0.00039 is needed"),
    (
        UsageError,
        {},
        {"column": "few", "hard": "low", "skip_hardest": 0.9},
        r"cannot keep 388: 1,165 of 1,294 candidates are left out first",
    ),
    (UsageError, {"label": None}, {}, r"--balance class needs a column 'label' and .* has none: use --balance none"),
    (UsageError, {"label": "texts"}, {}, r"needs class numbers and column 'label' of .* is string: use --balance none"),
    (UsageError, {"label": "holes"}, {}, r"--balance class needs labels and \d+ rows have none: use --balance none"),
    (
        SourceError,
        {"few": "nan"},
        {"column": "few", "hard": "low"},
        r"144 of 1,294 rows have no finite score \(the first is '\d{8}'\)",
    ),
    (SourceError, {"few": "texts"}, {"column": "few", "hard": "low"}, r"column 'few' is string: scores must be numbers"),
    (SourceError, {"id": "twice"}, {}, r"lists '\d{8}' more than once: give each id one row"),
    (SourceError, {"id": "twice"}, {"column": "few", "hard": "low"}, r"lists '\d{8}' more than once: give each id one row"),
    (SourceError, {"id": "holes"}, {"column": "few", "hard": "low"}, r"column 'id' has empty rows: every row needs an id"),
    (SourceError, {"id": "bytes"}, {"column": "spread", "hard": "low"}, r"column 'id' holds what is not UTF-8 text: mend the file"),
    (SourceError, {"id": "floats"}, {}, r"column 'id' is double: ids are texts or whole numbers"),
    (UsageError, {"id": None}, {}, r"has no column id or key or uid or __key__ to tell rows apart by: it has label"),
]


def spoilt(table: Path, out: Path, columns: dict[str, str | None]) -> Path:
    """The table with something wrong."""
    whole = pq.read_table(table)
    n = len(whole)
    found: dict[str, Any] = {}
    for name, what in columns.items():
        values = whole[name].to_pylist()
        found[name] = {
            None: None,
            "texts": pa.array(list(map(str, values))),
            "holes": pa.array([None if at % 7 == 3 else one for at, one in enumerate(values)], whole.schema.field(name).type),
            "nan": pa.array([None if at % 9 == 5 else float(one) for at, one in enumerate(values)]) if name == "few" else None,
            "twice": pa.array([*values[:-1], values[0]]),
            "floats": pa.array(np.arange(n) * 1.0),
            "bytes": pa.Array.from_buffers(
                pa.string(), n, [None, pa.py_buffer(np.arange(n + 1, dtype=np.int32) * 2), pa.py_buffer(b"\xff\xfe" * n)]
            ),
        }[what]
    return changed(table, out, **found)


@pytest.mark.parametrize(("kind", "columns", "settings", "said"), REFUSED, ids=str)
def test_refused(
    table: Path, tmp_path: Path, kind: type[KdpruneError], columns: dict[str, str | None], settings: dict[str, Any], said: str
) -> None:
    path = spoilt(table, tmp_path / "spoilt.parquet", columns) if columns else table
    assert re.search(said, refusal(kind, path, out=tmp_path / "list.parquet", **settings))


def test_paths_that_are_refused(train: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no")
    assert "does not exist: give a Parquet file" in refusal(UsageError, tmp_path / "nowhere", out=out)
    assert "holds no .parquet files" in refusal(UsageError, tmp_path / "empty", out=out)
    assert "is of kind dataset, and no table of scores: `kdprune-data select` chooses from it" in refusal(UsageError, train, out=out)
    assert "cannot be read as Parquet" in refusal(SourceError, tmp_path / "text.parquet", out=out)
    assert "no table was given" in refusal(UsageError, out=out)
    assert "is no name of a Parquet file: give one that ends in .parquet" in refusal(UsageError, table, out=tmp_path / "list.txt")
    assert "is the table itself: choose another" in refusal(UsageError, table, out=table, overwrite=True)
    assert "lies inside an artefact" in refusal(ExistsError, table, out=train / "list.parquet")
    (tmp_path / "folder.parquet").mkdir()
    assert "is a folder: give the name of a file with --out" in refusal(ExistsError, table, out=tmp_path / "folder.parquet")
    other = changed(table, tmp_path / "other.parquet", few=pa.array(np.zeros(len(ids(table)))))
    message = refusal(SourceError, table, other, out=out, column="few", hard="low")
    assert "column 'few' is double, and int64 in" in message
    assert "more than once" in refusal(SourceError, table, table, out=out)


def test_a_damaged_table_is_refused(table: Path, tmp_path: Path) -> None:
    """Whatever byte is wrong: a line, and nothing is left."""
    whole = bytearray(table.read_bytes())
    damaged = tmp_path / "damaged.parquet"
    for at in range(4, len(whole), len(whole) // 25):
        spoiled = whole[:]
        spoiled[at : at + 64] = bytes(255 - one for one in spoiled[at : at + 64])
        damaged.write_bytes(spoiled)
        out = tmp_path / "list.parquet"
        out.unlink(missing_ok=True)
        with contextlib.suppress(KdpruneError):  # in bytes that pick reads; those of other columns do no harm
            run(damaged, out=out, column="spread", hard="low")
            continue
        assert not out.exists()


def test_interrupted(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    """Ctrl-C leaves nothing, neither the file nor the folder that was made for it; what a killed run left is no hindrance."""
    n = 3_000_000
    ids_ = pa.array(np.arange(n)).cast(pa.string())
    pq.write_table(pa.table({"id": ids_, "label": pa.array(np.arange(n) % 10), "s": np.arange(n) * 1.0}), tmp_path / "big.parquet")
    line = ["pick", "big.parquet", "--frac", "0.5", "--column", "s", "--hard", "high", "--out", "deep/list.parquet", "--json"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        with started(*line, cwd=tmp_path) as running:
            while running.poll() is None and not (tmp_path / "deep" / ".list.parquet.tmp").exists():
                time.sleep(0.001)
            os.kill(running.pid, number)
            out, err = running.communicate(timeout=60)
        assert running.returncode == code, err
        assert number == signal.SIGKILL or json.loads(out)["error"]["exit_code"] == 130
        assert (tmp_path / "deep").exists() == (number == signal.SIGKILL)
    with started(*line, cwd=tmp_path) as running:
        out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert json.loads(out)["counts"]["kept"] == n // 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["list.parquet"]


def test_one_process_writes_at_a_time(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.parquet"
    schema = pa.schema([("id", pa.string())])
    with listed.create(out, schema, listed.Facts({}, [], {})):
        with (
            pytest.raises(ExistsError, match=r"another process is writing .*: wait for it"),
            listed.create(out, schema, listed.Facts({}, [], {})),
        ):
            pass
        assert not out.exists()
    assert out.exists()
