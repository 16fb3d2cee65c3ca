"""The passes of `score`: networks over the shards, and then what is computed from the embeddings of all samples.

Without scores from the embedding a shard's part is written when the networks have seen it. With them, the first pass writes the embeddings
and sets the other columns aside in `.partial/`; the second computes from the embeddings as they are stored, and writes the parts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from kdprune_pipelines import _costs
from kdprune_pipelines._bf16 import lowered
from kdprune_pipelines._columns import Columns
from kdprune_pipelines._console import bar, count, say
from numpy.typing import NDArray

from kdprune_data import order
from kdprune_data.errors import SourceError, some
from kdprune_data.formats.build import Build
from kdprune_data.formats.scores import PART, SCORES, VECTORS, read_vectors, write_part, write_vectors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kdprune_data.learn.stream import Images
    from kdprune_data.learn.views import Normalisation
    from kdprune_data.scores import Embedded, Outputs

Values = dict[str, NDArray[np.float32]]
FLOAT16_MOST = 65504.0
BROKEN = "the network's weights are broken"
BLAMED = {
    "early": BROKEN,
    "final": BROKEN,
    "dynamics": "the teacher's files in dynamics/ are broken; make or fetch it again",
    "embedding": "the embeddings written here are broken; give --overwrite",
}
"""What is wrong where a number is not finite, by what it is made from."""


@dataclass(frozen=True)
class Networks:
    """The networks by what they are asked for: `early` and `final` scores, each the mean over its networks; `teacher` for the files of
    embeddings and logits, None where none are written. `size`: the side of their input, in pixels; `exact`: of networks that are asked in
    bf16, by their ids, those in float32, which scores from the network itself are computed of."""

    early: Sequence[nn.Module]
    final: Sequence[nn.Module]
    teacher: nn.Module | None
    normalisation: Normalisation
    size: int
    device: torch.device
    exact: Mapping[int, nn.Module] = field(default_factory=dict)

    @property
    def all(self) -> list[nn.Module]:
        """Each once."""
        found = {id(net): net for net in (*self.early, *self.final, *([] if self.teacher is None else [self.teacher]))}
        return list(found.values())

    def in_bf16(self) -> Networks:
        """These, asked in bf16. Raises UsageError for a network that cannot be."""
        made = dict(zip(map(id, self.all), lowered(self.all, size=self.size, device=self.device), strict=True))
        return replace(self._turned(made), exact={id(made[id(net)]): net for net in self.all})

    def in_float32(self) -> Networks:
        """These, asked in float32."""
        return replace(self._turned(self.exact), exact={}) if self.exact else self

    def _turned(self, into: Mapping[int, nn.Module]) -> Networks:
        early, final = ([into[id(net)] for net in nets] for nets in (self.early, self.final))
        return replace(self, early=early, final=final, teacher=None if self.teacher is None else into[id(self.teacher)])


@dataclass(frozen=True)
class Scorer:
    """The work: which scores of which images by which networks. `vectors`: the files beside the parts; `sources`: where each score comes
    from, as files tell; `memory` in bytes."""

    columns: Columns
    images: Images
    networks: Networks
    sources: Mapping[str, str]
    vectors: Sequence[str]
    batch: int
    jobs: int
    memory: int
    seed: int


def score(scorer: Scorer, build: Build, past: Values) -> int:
    """Write all parts, and the files beside them; what an earlier run has written stays. Returns the number of shards.

    past: the scores from dynamics, of every row of the data set. Raises SourceError for a score that is no finite number.
    """
    data = scorer.images.data
    rows = data.usable()
    shards = np.unique(data.shards[rows]).tolist()
    say(f"scoring {count(len(rows), 'sample')} in {count(len(shards), 'shard')} on {scorer.networks.device}")
    todo = [shard for shard in shards if not _stands(scorer, build, shard)]
    left = sum(len(data.rows_of(shard)) for shard in todo)
    names = scorer.columns.of("embedding")
    with bar("score", total=len(rows), initial=len(rows) - left) as progress:
        for shard in todo:
            found = _one_shard(scorer, build, shard, progress.update)
            if names:
                _set_aside(build, _aside(shard), found)
            else:
                _write(scorer, build, shard, found | {name: values[data.rows_of(shard)] for name, values in past.items()})
    if names:
        _second_pass(scorer, build, shards, past)
    build.keep_only(file.path for file in build.files() if not file.path.startswith(_scratch(build, "")))
    return len(shards)


def _stands(scorer: Scorer, build: Build, shard: int) -> bool:
    """Whether an earlier run has left all that the networks give of a shard."""
    vectors = all(build.finished(VECTORS % (what, shard)) is not None for what in scorer.vectors)
    aside = bool(scorer.columns.of("embedding")) and build.finished(_scratch(build, _aside(shard))) is not None
    return vectors and (aside or build.finished(PART % shard) is not None)


def _one_shard(scorer: Scorer, build: Build, shard: int, tick: Callable[[int], None]) -> Values:
    """The networks' scores of one shard; its embeddings and logits are written."""
    rows = scorer.images.data.rows_of(shard)
    pieces: list[Values] = []
    vectors: dict[str, list[NDArray[np.float16]]] = {what: [] for what in scorer.vectors}
    for columns, found in scored(scorer, order.batches(rows, scorer.batch)):
        pieces.append(columns)
        for what, values in found.items():
            vectors[what].append(values)
        tick(len(columns["loss"]))
    columns = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    _check_finite(scorer, columns, rows)
    whole = {what: np.concatenate(batches) for what, batches in vectors.items()}
    _check_finite(scorer, whole, rows)
    for what, values in whole.items():
        write_vectors(build, what, shard, values)
    return columns


@dataclass(frozen=True)
class Heard:
    """What the networks say of a batch, each by its id. images: as they see them; truth: labels, int64 of shape (n,)."""

    images: Tensor
    truth: Tensor
    outputs: Mapping[int, Outputs]


def scored(scorer: Scorer, batches: Iterable[NDArray[np.int64]]) -> Iterator[tuple[Values, dict[str, NDArray[np.float16]]]]:
    """The scores of each batch of rows that the networks give, and its embedding and logits."""
    for one in heard(scorer, batches):
        said = None if scorer.networks.teacher is None else one.outputs[id(scorer.networks.teacher)]
        yield of_batch(scorer, one), {} if said is None else {what: _half(getattr(said, what).numpy()) for what in scorer.vectors}


def heard(scorer: Scorer, batches: Iterable[NDArray[np.int64]]) -> Iterator[Heard]:
    """What the networks say of each batch of rows."""
    import torch

    from kdprune_data.learn.inference import evaluating, evaluation_batches, overlapped
    from kdprune_data.learn.memory import sent
    from kdprune_data.learn.models import features, head
    from kdprune_data.scores import Outputs

    networks, labels = scorer.networks, scorer.images.data.labels
    nets = networks.all
    biased = [head(net).bias is not None for net in nets]

    def begin(batch: tuple[NDArray[np.int64], Tensor]) -> tuple[NDArray[np.int64], Tensor, list[tuple[Tensor, Tensor]]]:
        rows, pixels = batch
        images = networks.normalisation.apply(sent(pixels, networks.device))
        return rows, images, [features(net, images) for net in nets]

    def end(begun: tuple[NDArray[np.int64], Tensor, list[tuple[Tensor, Tensor]]]) -> Heard:
        rows, images, found = begun
        truth = torch.from_numpy(labels[rows].astype(np.int64))
        # Scores are computed in float64, which not every device has.
        said = [Outputs(z.cpu(), truth, h.cpu(), bias) for (h, z), bias in zip(found, biased, strict=True)]
        return Heard(images, truth, dict(zip(map(id, nets), said, strict=True)))

    with ExitStack() as stack:
        for net in (*nets, *networks.exact.values()):
            stack.enter_context(evaluating(net, networks.device))
        shown = evaluation_batches(scorer.images, batches, size=networks.size, threads=scorer.jobs)
        yield from overlapped(begin, end, shown, networks.device)


def of_batch(scorer: Scorer, one: Heard) -> Values:
    """The scores that the networks give of a batch."""
    import torch

    from kdprune_data.scores import FROM_MODEL, FROM_OUTPUTS

    networks, columns = scorer.networks, Values()
    for name in scorer.columns.of("early", "final"):
        nets = networks.early if SCORES[name].source == "early" else networks.final
        if name in FROM_MODEL:
            exact, truth = [networks.exact.get(id(net), net) for net in nets], one.truth.to(networks.device)
            each = [FROM_MODEL[name](net, one.images, truth, memory=scorer.memory) for net in exact]
        else:
            each = [FROM_OUTPUTS[name](one.outputs[id(net)]) for net in nets]
        columns[name] = (each[0] if len(each) == 1 else torch.stack(each).mean(0)).float().numpy()
    return columns


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded and clipped to what float16 holds; what is no finite number becomes NaN, so that it is seen."""
    clipped = np.where(np.isfinite(values), values, np.nan).clip(-FLOAT16_MOST, FLOAT16_MOST)
    return np.asarray(clipped.astype(np.float16))


def _aside(shard: int) -> str:
    return f"outputs-{shard:06d}.npy"


def _scratch(build: Build, name: str) -> str:
    """The path, in the artefact, of something that is gone when it is sealed; written and trusted as its files are."""
    folder = build.scratch("x").relative_to(build.folder).parent
    return f"{folder.as_posix()}/{name}"


def _set_aside(build: Build, name: str, columns: Values) -> None:
    """Keep columns until all of them are there, in the order of their names."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack([columns[one] for one in sorted(columns)]), allow_pickle=False)
    build.write(_scratch(build, name), buffer.getvalue())


def _taken_up(build: Build, name: str, names: Sequence[str]) -> Values:
    """What was set aside under these names."""
    return dict(zip(sorted(names), np.load(build.folder / _scratch(build, name), allow_pickle=False), strict=True))


def _second_pass(scorer: Scorer, build: Build, shards: Sequence[int], past: Values) -> None:
    """The scores from the embedding, and the parts with all columns."""
    data = scorer.images.data
    todo = [shard for shard in shards if build.finished(PART % shard) is None]
    if not todo:
        return
    embedded = _embedded(scorer, build, shards)
    whole = dict(past)
    for name in scorer.columns.of("embedding"):
        aside = f"{name}.npy"
        if build.finished(_scratch(build, aside)) is None:
            say(_costs.told(name, embedded, scorer.columns.settings[name], scorer.memory))
            _set_aside(build, aside, {name: from_embedding(scorer, name, embedded)})
        whole[name] = np.zeros(len(data), np.float32)
        whole[name][data.usable()] = _taken_up(build, aside, [name])[name]
    for shard in todo:
        rows = data.rows_of(shard)
        found = _taken_up(build, _aside(shard), scorer.columns.of("early", "final"))
        _write(scorer, build, shard, found | {name: values[rows] for name, values in whole.items()})


def _embedded(scorer: Scorer, build: Build, shards: Sequence[int]) -> Embedded:
    """The embeddings of all samples, as stored."""
    from kdprune_data.scores import Embedded

    data = scorer.images.data
    rows = data.usable()
    stored = np.concatenate([read_vectors(build.folder / (VECTORS % ("embedding", shard)), "embedding") for shard in shards])
    return Embedded(data.uids[rows], data.labels[rows], stored, scorer.seed, scorer.memory)


def from_embedding(scorer: Scorer, name: str, embedded: Embedded) -> NDArray[np.float32]:
    """One score of all samples."""
    from kdprune_data.scores import FROM_EMBEDDING

    return FROM_EMBEDDING[name].compute(embedded, scorer.columns.settings[name]).astype(np.float32)


def _write(scorer: Scorer, build: Build, shard: int, columns: Values) -> None:
    """Write one part."""
    data = scorer.images.data
    rows = data.rows_of(shard)
    _check_finite(scorer, columns, rows)
    ordered = {name: columns[name] for name in scorer.columns.names}
    write_part(build, shard, data.ids[rows].tolist(), data.labels[rows], ordered, scorer.sources)


def _check_finite(scorer: Scorer, columns: Mapping[str, NDArray[np.floating]], rows: NDArray[np.int64]) -> None:
    """Raise SourceError for a score, or a row of embeddings or logits, that is not finite; it says what is broken by where that is from."""
    for name, values in columns.items():
        bad = scorer.images.data.ids[rows[~np.isfinite(values.reshape(len(values), -1)).all(1)]]
        if len(bad):
            why = BLAMED[SCORES[name].source if name in SCORES else "final"]
            raise SourceError(f"{name} is not a finite number for {count(len(bad), 'sample')} ({some(bad)}): {why}")
