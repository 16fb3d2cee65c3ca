"""learn/checkpoint.py: whatever a training had when it was stopped, it ends as if it had not been; and what is no state is refused."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kdprune_data.errors import FormatError, KdpruneError
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import loop, models
from kdprune_data.learn.checkpoint import Checkpoint, state_file
from kdprune_data.learn.dynamics import Recorder
from kdprune_data.learn.loop import Hooks, Recipe, Training
from kdprune_data.learn.stream import Batch, DrawnViews, Feed, Images
from kdprune_data.learn.views import Normalisation, Policy
from kdprune_data.learn.weights import load_weights

EVEN = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
RECIPE = Recipe(epochs=3, batch=27, lr=0.05)
"""Four steps an epoch."""


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, whatever it costs."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0.0)


def training(chain: Path, recipe: Recipe = RECIPE, model: str = "dropout") -> Training:
    data = Dataset.open(chain / "data/train")
    feed = Feed(Images(data), DrawnViews(data, Policy("pad-crop", 8, False, 0, pad=1)), recipe.batch, recipe.seed)
    if model == "dropout":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net: nn.Module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 10))
    else:
        net = models.build(models.resolve(model, classes=10, size=8), seed=recipe.seed)
    return Training(net, feed, recipe, normalisation=EVEN, device=torch.device("cpu"))


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.labels)


def go_on(one: Training, hooks: Hooks, checkpoint: Checkpoint) -> None:
    """To the end, from where the checkpoint stands, where it has a state."""
    checkpoint.load(one, hooks.partial)
    one.run(cross_entropy, hooks, checkpoint)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Watched:
    """A stage with a recorder: the dynamics of every whole epoch, and a stop after some steps."""

    def __init__(self, n: int, stop: int | None = None) -> None:
        self.recorder = Recorder(n)
        self.taken: dict[int, Any] = {}
        self.left = stop

    def hooks(self) -> Hooks:
        return Hooks(
            observe=self.observe,
            partial=self.recorder,
            after_epoch=self.after_epoch,
            validate=lambda: (float(torch.rand(())) * 0, 0.0),  # it may draw: the next epoch is seeded
            tick=self.tick,
        )

    def observe(self, batch: Batch, logits: Tensor) -> None:
        self.recorder.observe(batch, logits)

    def after_epoch(self, epoch: int, _: Mapping[str, Any]) -> None:
        self.taken[epoch] = {k: v.tobytes() for k, v in self.recorder.take(np.arange(108)).items()}

    def tick(self, _: int) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("dropout", RECIPE),
        ("dropout", Recipe(steps=10, batch=27, lr=0.05, ema=0.7, clip=0.5)),
        ("dropout", Recipe(epochs=3, batch=27, lr=0.05, momentum=0.0)),
        ("resnet8", Recipe(epochs=3, batch=27, lr=0.05, ema=0.7)),
    ],
    ids=["dropout", "steps, average and clipping", "no momentum", "norms and average"],
)
@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_an_interrupted_training_ends_the_same(chain: Path, tmp_path: Path, model: str, recipe: Recipe, stop: int) -> None:
    """Stopped after so many steps, in epochs and between them; continued by another object, in another place of torch's generator."""
    whole, undisturbed = training(chain, recipe, model), Watched(108)
    whole.run(cross_entropy, undisturbed.hooks())
    checkpoint, stopped = Checkpoint(tmp_path / "last.ckpt"), Watched(108, stop)
    with pytest.raises(KeyboardInterrupt):
        training(chain, recipe, model).run(cross_entropy, stopped.hooks(), checkpoint)
    torch.rand(17)
    second, watched = training(chain, recipe, model), Watched(108)
    go_on(second, watched.hooks(), checkpoint)
    assert second.metrics == whole.metrics
    assert equal(second.state(), whole.state())
    assert all(undisturbed.taken[epoch] == found for epoch, found in (stopped.taken | watched.taken).items())
    assert len(stopped.taken | watched.taken) == 3
    # The stop comes just before the step would be saved: all those before it were.
    assert len(stopped.taken) + len(watched.taken) in (3, 4)


def test_it_goes_on_where_it_was(chain: Path, tmp_path: Path) -> None:
    """Not at the beginning of the epoch: batches are shown once, but for the one that was not saved."""
    seen: list[int] = []
    checkpoint = Checkpoint(tmp_path)
    for _ in range(20):
        one, left = training(chain), 3

        def observe(batch: Batch, _: Tensor) -> None:
            nonlocal left
            seen.append(int(batch.rows[0]))
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        try:
            go_on(one, Hooks(observe=observe), checkpoint)
            break
        except KeyboardInterrupt:
            continue
    whole = training(chain)
    expected = [int(rows[0]) for epoch in range(3) for rows in whole.feed.plan(epoch)]
    assert [row for n, row in enumerate(seen) if n == 0 or row != seen[n - 1]] == expected
    assert len(seen) == 12 + 5
    whole.run(cross_entropy, Hooks())
    assert equal(one.state(), whole.state())


def test_a_finished_checkpoint_has_nothing_left_to_do(chain: Path, tmp_path: Path) -> None:
    one = training(chain)
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    one.run(cross_entropy, Hooks(), checkpoint)
    checkpoint.save(one)
    again = training(chain)
    go_on(again, Hooks(observe=lambda *_: pytest.fail("it trained")), checkpoint)
    assert equal(again.state(), one.state())


def stopped_at(chain: Path, folder: Path, steps: int, recipe: Recipe = RECIPE) -> Checkpoint:
    """A checkpoint after so many steps."""
    checkpoint = Checkpoint(folder, "this run")
    one = training(chain, recipe)
    for n, _ in enumerate(one.steps(cross_entropy, Hooks(partial=Recorder(108)), checkpoint), 1):
        if n > steps:
            break
    return checkpoint


def test_it_names_its_newest_file_and_keeps_no_other(chain: Path, tmp_path: Path) -> None:
    checkpoint = stopped_at(chain, tmp_path / "last.ckpt", 6)
    assert sorted(p.name for p in checkpoint.folder.iterdir()) == ["state-000000006.safetensors", "state.json"]
    note = json.loads((checkpoint.folder / "state.json").read_text())
    assert set(note) == {"run", "epoch", "within", "seen", "file", "sha256", "metrics"}
    assert (note["epoch"], note["within"], note["seen"], note["file"]) == (1, 2, 54, "state-000000006.safetensors")
    assert state_file(checkpoint.folder) == checkpoint.folder / note["file"]
    names = {key.split("/")[0] for key in load_file(state_file(checkpoint.folder))}
    assert names == {"model", "momentum", "sums", "rng", "partial"}


@pytest.mark.parametrize("killed", ["tensors", "named", "note", "noted"])
def test_killed_while_a_checkpoint_is_written(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    """At each of its moments, as if the process were gone: one whole state is there, the old one or the new one."""
    whole = training(chain)
    whole.run(cross_entropy, Hooks())
    checkpoint = stopped_at(chain, tmp_path, 5)

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:-100])
        raise KeyboardInterrupt

    def replaced(path: Path, target: Path) -> Path:
        if killed in ("named", "note") and path.name.startswith(".state-" if killed == "named" else ".state.json"):
            raise KeyboardInterrupt
        return rename(path, target)

    rename = Path.replace
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if killed == "tensors":
            patched.setattr(Path, "write_bytes", half)
        patched.setattr(Path, "replace", replaced)
        if killed == "noted":
            patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        go_on(training(chain), Hooks(partial=Recorder(108)), checkpoint)
    again = training(chain)
    go_on(again, Hooks(partial=Recorder(108)), checkpoint)
    assert equal(again.state(), whole.state())


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_no_room_for_a_checkpoint(chain: Path, tmp_path: Path, room: int) -> None:
    """The error names the file; nothing half written is left, and the state before is whole."""
    checkpoint = stopped_at(chain, tmp_path, 5)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*state-000000006\.safetensors") as caught:
            go_on(training(chain), Hooks(partial=Recorder(108)), checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def spoilt(folder: Path) -> Iterator[tuple[str, str]]:
    """One fault after the other, each on its own, and what is said of it."""
    note, kept = folder / "state.json", (folder / "state.json").read_text()
    state = state_file(folder)
    whole = state.read_bytes()
    facts = json.loads(kept)
    for text, said in (
        ("{", "cannot be read (JSONDecodeError)"),
        ("[]", "cannot be read (TypeError)"),
        ("{}", "cannot be read (KeyError)"),
        (json.dumps({**facts, "more": 1}), "is damaged"),
        (json.dumps({**facts, "file": "state-000000001.safetensors"}), "cannot be read (FileNotFoundError)"),
        (json.dumps({**facts, "sha256": "0" * 64}), "is damaged: its bytes are not those that were written"),
        (json.dumps({**facts, "run": "another"}), "is of a training with other settings"),
        (json.dumps({**facts, "within": 4}), "is of a longer training"),
        (json.dumps({**facts, "epoch": 9}), "is of a longer training"),
        (json.dumps({**facts, "epoch": None}), "does not fit this training (TypeError)"),
    ):
        note.write_text(text)
        yield text, said
    note.write_text(kept)
    for data in (whole[:100], whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        state.write_bytes(data)
        yield f"{len(data)} bytes", "is damaged: its bytes are not those that were written"
    state.unlink()
    yield "no file", "cannot be read (FileNotFoundError)"


def test_what_is_no_state_is_refused(chain: Path, tmp_path: Path) -> None:
    checkpoint = stopped_at(chain, tmp_path / "last.ckpt", 5)
    for fault, said in spoilt(checkpoint.folder):
        with pytest.raises(FormatError) as caught:
            checkpoint.load(training(chain), Recorder(108))
        assert f"the saved state {checkpoint.folder} {said}" in str(caught.value), fault
        assert str(caught.value).endswith("delete that folder to train from the beginning")


@pytest.mark.parametrize(
    "other", [("resnet8", RECIPE), ("dropout", Recipe(epochs=3, batch=27, ema=0.5))], ids=["another network", "with an average"]
)
def test_the_state_of_another_training_is_refused(chain: Path, tmp_path: Path, other: tuple[str, Recipe]) -> None:
    """Even under the same name."""
    checkpoint = stopped_at(chain, tmp_path, 5)
    with pytest.raises(FormatError, match="does not fit this training"):
        checkpoint.load(training(chain, other[1], other[0]))


def test_a_state_that_is_not_finite_is_never_saved(chain: Path, tmp_path: Path) -> None:
    """The last good one stays, and weights can be taken from it."""
    checkpoint = Checkpoint(tmp_path)
    one, done = training(chain), 0

    def loss_of(z: Tensor, batch: Batch) -> Tensor:
        nonlocal done
        done += 1
        return cross_entropy(z, batch) * (1e38 if done == 6 else 1.0)

    with pytest.raises(KdpruneError, match="training has diverged: after step 6"):
        one.run(loss_of, Hooks(), checkpoint)
    state = load_file(state_file(tmp_path))
    assert json.loads((tmp_path / "state.json").read_text())["epoch"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in state.values())
    fresh = training(chain)
    load_weights(fresh.model, state_file(tmp_path))
    assert all(torch.equal(v, state[f"model/{k}"]) for k, v in fresh.model.state_dict().items())


def test_saving_takes_at_most_a_twentieth_of_the_time(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SHARE", 20.0)
    one, saves = training(chain), []
    checkpoint = Checkpoint(tmp_path)
    clock = iter(range(10**6))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))  # each look is a second later: a save costs one
    monkeypatch.setattr(Checkpoint, "save", lambda _, training, __: saves.append(training.step))
    one.run(cross_entropy, Hooks(), checkpoint)
    assert saves == [1]


def test_a_copied_checkpoint_is_not_trusted(chain: Path, tmp_path: Path) -> None:
    stopped_at(chain, tmp_path / "a", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FormatError, match="is of a training with other settings"):
        Checkpoint(tmp_path / "b", "that run").load(training(chain))
