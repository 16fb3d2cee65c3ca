"""`cache` with other views and other voices: every crop, the image itself, several teachers, and logits from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kdprune_pipelines import _models

from kdprune_data.formats import lowrank
from kdprune_data.formats.dataset import Dataset
from kdprune_data.formats.logits import LogitCache
from kdprune_data.formats.manifest import Manifest
from kdprune_data.images import encode_png
from kdprune_data.learn import views
from kdprune_data.learn.stream import Images
from kdprune_data.learn.views import Geometry, Policy

Cli = Callable[..., Any]
SUBSET, TEACHER = Path("subsets/random-0.5-s0"), Path("teachers/resnet8-s0")
STUDENT = ["distill", "--model", "resnet8", "--steps", 4, "--batch", 16, "--name", "x", "--overwrite", "--logits"]


def read(workspace: Path, name: str, view: int) -> Any:
    data = Dataset.open(workspace / SUBSET)
    return LogitCache.open(workspace / "logits" / name).join(data).read(np.arange(len(data)), view)


def said(workspace: Path, teacher: Path, boxes: Geometry) -> np.ndarray:
    """What a teacher says of some boxes of the subset, in its own normalisation: float32 of shape (n, c)."""
    data, saved = Dataset.open(workspace / SUBSET), _models.open_model(workspace / teacher)
    pixels = views.render(Images(data).get(np.arange(len(data))), boxes, 8)
    with torch.no_grad():
        return saved.load(code=None).eval()(saved.normalisation.apply(pixels)).numpy()


# --- views


def test_every_crop_there_is(chain_copy: Path, kdprune: Cli) -> None:
    for line in (["cache", "--views", "all", "--name", "all"], ["verify", "logits/all"], [*STUDENT, "logits/all"]):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    cache = LogitCache.open(chain_copy / "logits/all")
    assert (cache.views, cache.policy["kind"]) == (9, "every-crop")
    seen = [read(chain_copy, "all", view) for view in range(9)]
    for n in range(54):
        assert len({(int(v.top[n]), int(v.left[n])) for v in seen}) == 9
    boxes = Geometry(*seen[4][:5])
    z = said(chain_copy, TEACHER, boxes)
    assert seen[4].logits.astype(np.float32) == pytest.approx(z - z.max(1, keepdims=True), rel=2e-3, abs=1e-4)


def test_the_image_itself(chain_copy: Path, kdprune: Cli) -> None:
    for line in (
        ["cache", "--views", "identity", "--name", "one", "--dtype", "float32"],
        ["verify", "logits/one"],
        [*STUDENT, "logits/one"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    data, found = Dataset.open(chain_copy / SUBSET), read(chain_copy, "one", 0)
    assert LogitCache.open(chain_copy / "logits/one").views == 1
    saved = _models.open_model(chain_copy / TEACHER)
    pixels = views.evaluation(Images(data).get(np.arange(len(data))), 8)
    with torch.no_grad():
        z = saved.load(code=None).eval()(saved.normalisation.apply(pixels)).numpy()
    assert found.logits == pytest.approx(z - z.max(1, keepdims=True), rel=1e-4, abs=1e-4)


def test_of_views_that_have_an_end_there_are_no_more(chain_copy: Path, kdprune: Cli) -> None:
    assert kdprune("cache", "--views", "all", "--name", "all", cwd=chain_copy).code == 0
    for line in ([*STUDENT, "logits/all", "--views", 10], ["export", "--logits", "logits/all", "--views", 10]):
        ran = kdprune(*line, cwd=chain_copy)
        said = "logits/all has 9 views, 10 are asked for: these are all, of policy every-crop; ask for fewer"
        assert (ran.code, said in ran.err) == (2, True), ran.err


def test_every_crop_of_photographs_has_no_end(tmp_path: Path, real_data: Path, kdprune: Cli) -> None:
    for line in (
        ["import", real_data / "photos/train.parquet"],
        ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 32, "--size", 32],
        ["cache", "data/train", "--views", "identity"],
        ["verify", "logits/train--resnet8-s0"],
    ):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    ran = kdprune("cache", "data/train", "--views", "all", "--name", "all", cwd=tmp_path)
    assert (ran.code, "resized crops have no end, give a number" in ran.err) == (2, True)


@pytest.mark.parametrize("option", [["--pad", 1], ["--scale", 0.5, 1], ["--ratio", 0.5, 2], ["--flip", "on"], ["--seed", 1]])
def test_the_image_itself_has_no_crops(chain: Path, kdprune: Cli, option: list[object]) -> None:
    ran = kdprune("cache", "--views", "identity", "--name", "one", *option, cwd=chain)
    said = f"--views identity shows the image itself, and {option[0]} is of crops: leave it out"
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_more_crops_than_may_be(tmp_path: Path, kdprune: Cli) -> None:
    """Of 64 pixels, with a pad of 63: file names hold four digits of a view's number."""
    for n in range(4):
        (tmp_path / "images" / str(n % 2)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        (tmp_path / "images" / str(n % 2) / f"{n}.png").write_bytes(encode_png(pixels))
    for line in (["import", "images"], ["teacher", "--model", "resnet8", "--steps", 1, "--batch", 4]):
        ran = kdprune(*line, cwd=tmp_path)
        assert ran.code == 0, ran.err
    ran = kdprune("cache", "data/train", "--views", "all", "--pad", 63, "--flip", "on", cwd=tmp_path)
    said = "--views all is 32,258 distinct crops with --pad 63: at most 10,000; give a smaller pad"
    assert (ran.code, said in ran.err) == (2, True), ran.err


# --- several teachers


@pytest.fixture
def two(chain_copy: Path, kdprune: Cli) -> Path:
    """The workspace with a second teacher, and an ensemble's cache at temperature 4."""
    for line in (
        ["teacher", "--model", "resnet8", "--epochs", 2, "--batch", 16, "--seed", 1],
        ["cache", "--teacher", TEACHER, "--ensemble", "teachers/resnet8-s1", "--temperature", 4, "--views", 2, "--dtype", "float32"],
    ):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    return chain_copy


def test_an_ensemble_is_the_mean_of_probabilities(two: Path, kdprune: Cli) -> None:
    name = "random-0.5-s0--resnet8-s0+resnet8-s1"
    found = read(two, name, 1)
    each = [said(two, Path("teachers") / one, Geometry(*found[:5])).astype(np.float64) for one in ("resnet8-s0", "resnet8-s1")]

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z / 4 - (z / 4).max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    assert softmax(found.logits.astype(np.float64)) == pytest.approx((softmax(each[0]) + softmax(each[1])) / 2, abs=1e-6)
    cache = LogitCache.open(two / "logits" / name)
    assert [one["name"] for one in cache.teachers] == ["resnet8-s0", "resnet8-s1"]
    assert cache.temperatures == (4, 4)
    assert kdprune("verify", f"logits/{name}", cwd=two).code == 0
    assert kdprune(*STUDENT, f"logits/{name}", cwd=two).code == 0
    made = Manifest.load(two / "students/x")
    assert [i["name"] for i in made.inputs if i["role"] == "teacher"] == ["resnet8-s0", "resnet8-s1"]
    ran = kdprune(*STUDENT, f"logits/{name}", "--temperature", 2, cwd=two)
    assert (ran.code, "holds at temperature 4 alone, --temperature is 2" in ran.err) == (1, True)
    ran = kdprune(*STUDENT, f"logits/{name}", "--teacher", TEACHER, cwd=two)
    assert (ran.code, "holds the logits of teacher resnet8-s0" in ran.err) == (1, True)


@pytest.mark.parametrize("temperature", [[], ["--temperature", 1, "--temperature", 4]])
def test_an_ensemble_has_one_temperature(two: Path, kdprune: Cli, temperature: list[object]) -> None:
    ran = kdprune("cache", "--teacher", TEACHER, "--ensemble", "teachers/resnet8-s1", *temperature, "--name", "y", cwd=two)
    assert (ran.code, "holds at one temperature: give --temperature once" in ran.err) == (2, True)


def test_an_ensemble_has_each_teacher_once(chain: Path, kdprune: Cli) -> None:
    ran = kdprune("cache", "--ensemble", TEACHER, "--temperature", 4, "--name", "y", cwd=chain)
    assert (ran.code, "are one teacher (" in ran.err, "which would count twice: leave one out" in ran.err) == (1, True, True), ran.err


def test_info_says_at_which_temperature_it_holds(two: Path, kdprune: Cli) -> None:
    said = kdprune("info", "logits/random-0.5-s0--resnet8-s0+resnet8-s1", cwd=two).out
    assert "holds     at temperature 4 alone" in said


def test_a_coded_ensemble(two: Path, kdprune: Cli) -> None:
    line = [
        "--teacher",
        TEACHER,
        "--ensemble",
        "teachers/resnet8-s1",
        "--temperature",
        4,
        "--views",
        2,
        "--fidelity",
        "1e-3",
        "--name",
        "y",
    ]
    ran = kdprune("cache", *line, cwd=two)
    assert ran.code == 0, ran.err
    cache = LogitCache.open(two / "logits/y")
    assert (cache.coded, cache.temperatures) == (True, (4, 4))


# --- logits from elsewhere


def table(workspace: Path, cells: int = 1, boxes: bool = False) -> dict[str, list[Any]]:
    """Somebody's logits for the subset, in another order than the subset's: the columns by name."""
    data = Dataset.open(workspace / SUBSET)
    random = np.random.default_rng(0)
    at = [(n, view) for view in range(cells) for n in random.permutation(len(data)).tolist()]
    columns: dict[str, list[Any]] = {"id": [data.ids[n] for n, _ in at], "logits": [random.normal(size=10).tolist() for _ in at]}
    if boxes:
        columns |= {"view": [view for _, view in at]}
        columns |= {side: random.integers(-1, 2, len(at)).tolist() for side in ("top", "left")}
        columns |= {side: random.integers(6, 9, len(at)).tolist() for side in ("height", "width")}
        columns |= {"flip": random.integers(0, 2, len(at)).astype(bool).tolist()}
    return columns


def test_logits_of_whole_images(chain_copy: Path, kdprune: Cli) -> None:
    columns = table(chain_copy)
    columns["id"].append("nobody's")
    columns["logits"].append([0.0] * 10)
    pq.write_table(pa.table(columns), chain_copy / "mine.parquet")
    ran = kdprune("cache", "--from", "mine.parquet", "--dtype", "float32", cwd=chain_copy)
    assert ran.code == 0, ran.err
    assert "1 row of mine.parquet of ids that subsets/random-0.5-s0 does not have, or that do not decode: left out" in ran.err
    folder = "logits/random-0.5-s0--mine"
    data, found = Dataset.open(chain_copy / SUBSET), read(chain_copy, "random-0.5-s0--mine", 0)
    theirs = {one: np.float32(z) for one, z in zip(columns["id"], columns["logits"], strict=True)}
    for n, one in enumerate(data.ids.tolist()):
        assert found.logits[n] == pytest.approx(theirs[one] - theirs[one].max(), abs=1e-6)
    assert LogitCache.open(chain_copy / folder).policy["kind"] == "identity"
    assert LogitCache.open(chain_copy / folder).teachers == []
    for line in (["verify", folder], ["info", folder], [*STUDENT, folder]):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    ran = kdprune(*STUDENT, folder, "--teacher", TEACHER, cwd=chain_copy)
    assert (ran.code, "holds the logits of somebody else's teacher, not of" in ran.err) == (1, True)


@pytest.mark.parametrize("coded", [False, True])
def test_logits_of_given_boxes(chain_copy: Path, kdprune: Cli, coded: bool) -> None:
    columns = table(chain_copy, cells=3, boxes=True)
    pq.write_table(pa.table(columns), chain_copy / "mine.parquet")
    more = ["--fidelity", "1e-2"] if coded else ["--dtype", "float32"]
    folder = "logits/given"
    for line in (["cache", "--from", "mine.parquet", "--name", "given", *more], ["verify", folder], [*STUDENT, folder]):
        ran = kdprune(*line, cwd=chain_copy)
        assert ran.code == 0, ran.err
    data = Dataset.open(chain_copy / SUBSET)
    rows = {(one, view): n for n, (one, view) in enumerate(zip(columns["id"], columns["view"], strict=True))}
    for view in range(3):
        found = read(chain_copy, "given", view)
        at = [rows[one, view] for one in data.ids.tolist()]
        for side in ("top", "left", "height", "width", "flip"):
            assert getattr(found, side).tolist() == [columns[side][n] for n in at]
        z = np.float32([columns["logits"][n] for n in at])
        if coded:
            assert lowrank.mean_kl(z, found.logits, 1) < 3e-2
        else:
            assert found.logits == pytest.approx(z - z.max(1, keepdims=True), abs=1e-6)
    assert Policy.from_dict(LogitCache.open(chain_copy / folder).policy).kind == "given"


@pytest.mark.parametrize(
    ("ids", "logits"),
    [
        (pa.string(), pa.list_(pa.float64())),
        (pa.large_string(), pa.large_list(pa.float32())),
        (pa.dictionary(pa.int16(), pa.string()), pa.list_(pa.float32(), 10)),
        (pa.string_view(), pa.list_(pa.float16())),
        (pa.string(), pa.list_(pa.int64())),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [7, 1000])
def test_columns_of_any_type_that_holds_them(chain_copy: Path, kdprune: Cli, ids: Any, logits: Any, group: int) -> None:
    columns = table(chain_copy)
    columns["logits"] = [
        np.rint(z).astype(np.float16) if logits.value_type == pa.float16() else np.rint(z).tolist() for z in columns["logits"]
    ]
    values = [[int(v) for v in z] if pa.types.is_integer(logits.value_type) else list(z) for z in columns["logits"]]
    made = pa.table({"more": columns["id"], "logits": pa.array(values, logits), "id": pa.array(columns["id"]).cast(ids)})
    pq.write_table(made, chain_copy / "mine.parquet", row_group_size=group)
    ran = kdprune("cache", "--from", "mine.parquet", "--dtype", "float32", cwd=chain_copy)
    assert ran.code == 0, ran.err
    theirs = {one: np.float32(z) for one, z in zip(columns["id"], columns["logits"], strict=True)}
    found = read(chain_copy, "random-0.5-s0--mine", 0)
    for n, one in enumerate(Dataset.open(chain_copy / SUBSET).ids.tolist()):
        assert np.array_equal(found.logits[n], theirs[one] - theirs[one].max())


def test_options_that_its_views_do_not_have(chain_copy: Path, kdprune: Cli) -> None:
    pq.write_table(pa.table(table(chain_copy)), chain_copy / "mine.parquet")
    for asked, code in (("4", 2), ("all", 2), ("1", 0), ("identity", 0)):
        ran = kdprune("cache", "--from", "mine.parquet", "--views", asked, "--dry-run", cwd=chain_copy)
        said = f"--views {asked}: mine.parquet has 1 view of each sample, which are taken; leave it out"
        assert (ran.code, said in ran.err) == (code, code == 2), ran.err


def test_a_folder_is_no_file(chain: Path, kdprune: Cli) -> None:
    ran = kdprune("cache", "--from", "data", cwd=chain)
    assert (ran.code, "--from data is a folder: give a Parquet file" in ran.err) == (2, True), ran.err


def test_its_name_in_a_file_of_options(chain_copy: Path, kdprune: Cli) -> None:
    pq.write_table(pa.table(table(chain_copy)), chain_copy / "mine.parquet")
    (chain_copy / "kdprune.toml").write_text('[cache]\nfrom = "mine.parquet"\n')
    assert kdprune("cache", cwd=chain_copy).code == 0
    ran = kdprune("cache", "--teacher", TEACHER, cwd=chain_copy)
    assert (ran.code, "--from stands in kdprune.toml [cache]" in ran.err) == (2, True), ran.err


def without_one(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        del values[5]


def twice(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        values.append(values[0])


def other_classes(columns: dict[str, list[Any]]) -> None:
    columns["logits"] = [z[:7] for z in columns["logits"]]


def not_finite(columns: dict[str, list[Any]]) -> None:
    columns["logits"][3][2] = float("nan")


def too_large(columns: dict[str, list[Any]]) -> None:
    columns["logits"] = [[z * 1e300 for z in one] for one in columns["logits"]]


def no_numbers(columns: dict[str, list[Any]]) -> None:
    columns["logits"] = ["a" for _ in columns["logits"]]


def no_ids(columns: dict[str, list[Any]]) -> None:
    columns["name"] = columns.pop("id")


def numbered(columns: dict[str, list[Any]]) -> None:
    columns["id"] = list(range(len(columns["id"])))


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (without_one, 1, r"mine.parquet has no logits for 1 of 54 samples of subsets/random-0.5-s0 ('"),
        (twice, 1, " has 2 rows: give every view of every sample once, 1 of each"),
        (other_classes, 1, "a row has 7 logits, the data have 10 classes"),
        (not_finite, 1, "are not finite numbers"),
        (too_large, 1, "and 51 more are not finite numbers that float32 holds: mend them"),
        (no_numbers, 1, "column 'logits' is string: expected lists of numbers, one per class"),
        (no_ids, 2, "has no column 'id': it has logits, name; expected id, logits"),
        (numbered, 1, "column 'id' is int64: expected the ids of the data, as text"),
    ],
)
def test_files_that_do_not_fit(
    chain_copy: Path, kdprune: Cli, change: Callable[[dict[str, list[Any]]], None], code: int, said: str
) -> None:
    columns = table(chain_copy)
    change(columns)
    pq.write_table(pa.table(columns), chain_copy / "mine.parquet")
    ran = kdprune("cache", "--from", "mine.parquet", cwd=chain_copy)
    assert (ran.code, said in ran.err) == (code, True), ran.err
    assert not (chain_copy / "logits/random-0.5-s0--mine").exists()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("height", 0, "column 'height' has values from 0 to 8: they are from 1 to"),
        ("view", 7, "' has no row: give every view of every sample once, 8 of each"),
        ("view", 99_999, "column 'view' has values from 0 to 99999: they are from 0 to 9999"),
        ("top", 2**21, "column 'top' has values from -1 to 2097152"),
        ("left", 0.5, "column 'left' is double: expected whole numbers"),
    ],
)
def test_boxes_that_cannot_be(chain_copy: Path, kdprune: Cli, column: str, value: Any, said: str) -> None:
    columns = table(chain_copy, cells=3, boxes=True)
    columns[column] = [value if n == 110 else type(value)(one) for n, one in enumerate(columns[column])]
    pq.write_table(pa.table(columns), chain_copy / "mine.parquet")
    ran = kdprune("cache", "--from", "mine.parquet", cwd=chain_copy)
    assert (ran.code, said in ran.err) == (1, True), ran.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--teacher", TEACHER], "--from takes logits from elsewhere and --teacher asks a teacher: give one of the two"),
        (["--pad", 2], "the views of --from are what its file says, and --pad is of those that are drawn: leave it out"),
        (["--flip", "on"], "and --flip is of those that are drawn: leave it out"),
        (["--seed", 3], "and --seed is of those that are drawn: leave it out"),
        (["--dtype", "int8"], "is not one of"),
        ([], "--from mine.parquet does not exist: give a Parquet file with the columns id and logits"),
    ],
)
def test_options_that_do_not_go_with_it(chain_copy: Path, kdprune: Cli, more: list[Any], said: str) -> None:
    ran = kdprune("cache", "--from", "mine.parquet", *more, cwd=chain_copy)
    assert (ran.code, said in ran.err) == (2, True), ran.err
