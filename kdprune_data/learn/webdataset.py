"""`as_webdataset`: a subset's shards as a pipeline of `webdataset`, every sample with the soft labels of the view that an epoch shows.

1. The shards come in the order of the epoch, and webdataset shares them out among nodes and workers.
2. `Join` lets webdataset read them, finds each sample in the index, by shard and key, holds its image against the digest there, and adds
   label, box and logits.
3. Whatever stages the user appends come behind.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from kdprune_data import images, order
from kdprune_data.errors import SourceError, UsageError, some
from kdprune_data.formats import indexing
from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn import views
from kdprune_data.learn.stream import ViewSource, view_source
from kdprune_data.learn.views import Geometry

Sample = dict[str, Any]


class Shards(IterableDataset[Sample]):
    """The shards of an epoch as webdataset hands them on: dicts with `url`, and here `shard`, their number, and `epoch`, which all workers
    see."""

    def __init__(self, data: Dataset, seed: int, epoch: Tensor) -> None:
        super().__init__()
        self._paths = [str(path.resolve()) for path in data.shard_paths]
        self._of_samples = data.shards[data.usable()]
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[Sample]:
        epoch = int(self._epoch)  # of all that follows, whatever is set meanwhile
        for shard in order.shard_order(self._of_samples, seed=self._seed, epoch=epoch).tolist():
            yield {"url": self._paths[shard], "shard": shard, "epoch": epoch}


@dataclass(frozen=True)
class Join:
    """A stage that reads shards with webdataset and gives the samples what the index and the view of the epoch say of them."""

    data: Dataset
    source: ViewSource
    weights: NDArray[np.float32]
    render: bool

    def __call__(self, shards: Iterable[Sample]) -> Iterator[Sample]:
        """Shards in, their samples out, but for those that are not of the data set or do not decode.

        Raises SourceError for a shard that is missing, no tar, or whose samples are not those of the index.
        """
        for one in shards:
            path = Path(one["url"])
            try:
                # Opened here: webdataset leaves its streams to the garbage collector, and takes `#` in a path for part of an address.
                with path.open("rb") as stream:
                    yield from self._shard(one["shard"], one["epoch"], group_by_keys(tar_file_expander([one | {"stream": stream}])))
            except FileNotFoundError:
                raise SourceError(f"{path} does not exist: it may have been moved; fetch it or index the set again") from None
            except tarfile.TarError as error:
                raise SourceError(f"{path} cannot be read as a tar ({type(error).__name__}): fetch it again") from None

    def _shard(self, shard: int, epoch: int, samples: Iterable[Sample]) -> Iterator[Sample]:
        rows = self.data.rows_of(shard)
        places = defaultdict(list)  # several of one key where an adopted set, whose ids are SHARD/key, was pruned
        for place, key in enumerate(self.data.index["key"].take(rows).to_pylist()):
            places[key].append(place)
        boxes, logits = self.source.show(rows, epoch)
        for sample in samples:
            waiting = places.get(sample["__key__"])
            if waiting:
                place = self._place(sample, rows, waiting)
                waiting.remove(place)
                yield self._joined(sample, int(rows[place]), boxes.take(np.asarray([place])), None if logits is None else logits[place])
        if absent := [key for key, waiting in places.items() if waiting]:
            path = self.data.shard_paths[shard]
            raise SourceError(f"{path} was changed: it lacks the samples {some(absent)}; make or fetch {self.data.folder} again")

    def _place(self, sample: Sample, rows: NDArray[np.int64], waiting: list[int]) -> int:
        """Which of the samples of its key it is: the one whose image it has."""
        if not self.data.has_digests:
            return waiting[0]
        digest = indexing.image_digest(self._image(sample))
        found = next((place for place in waiting if self.data.sha256[rows[place]].tobytes() == digest), None)
        if found is None:
            raise SourceError(
                f"{sample['__url__']} was changed: sample {sample['__key__']!r} is not the image that was indexed; "
                f"make or fetch {self.data.folder} again"
            )
        return found

    def _image(self, sample: Sample) -> bytes:
        named = self.data.members.image
        found = [sample[name] for name in ([named] if named else images.MEMBERS) if name in sample]
        return bytes(found[0]) if found else b""

    def _rendered(self, row: int, encoded: bytes, box: Geometry) -> Tensor:
        policy = self.source.policy
        high, wide = self.data.sizes[row].tolist()
        return views.shown(policy, [views.Scalable(encoded, (high, wide)) if policy.scaled else images.decode(encoded)], box)[0]

    def _joined(self, sample: Sample, row: int, box: Geometry, logits: NDArray[np.floating] | None) -> Sample:
        label, encoded = int(self.data.labels[row]), self._image(sample)
        added: Sample = {"box": torch.tensor([int(side[0]) for side in (box.top, box.left, box.height, box.width)])}
        added |= {"flip": bool(box.flip[0]), "weight": float(self.weights[row])}
        if logits is not None:
            added["logits"] = torch.from_numpy(logits.astype(np.float32))
        if self.render:
            added["image"] = self._rendered(row, encoded, box)
        if clash := added.keys() & sample.keys():
            where = f"{sample['__url__']} sample {sample['__key__']!r}"
            raise SourceError(f"{where} has a member .{min(clash)}, and such a value is added here: rename the member")
        sample.pop("cls", None)  # which may be another than the label, where that comes from another member
        return sample | {"__id__": self.data.ids[row]} | ({} if label < 0 else {"cls": str(label).encode()}) | added


class SoftLabels(wds.FluidWrapper):  # type: ignore[misc]  # webdataset has no types
    """A pipeline of webdataset with an epoch. Stages are appended as to any other; the result shares the epoch."""

    def __init__(self, shards: Shards, join: Join, epoch: Tensor) -> None:
        super().__init__(shards)
        self._epoch = epoch
        for stage in (wds.split_by_node, wds.split_by_worker, join):
            self.append(stage)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration shows, in the workers of a DataLoader too."""
        self._epoch.fill_(epoch)

    def decode(self, *handlers: Any, **settings: Any) -> Any:
        """As webdataset's, but what is decoded already (logits, box, ...) is left as it is."""
        return super().decode(*handlers, **{"partial": True, **settings})


def as_webdataset(
    subset: str | Path,
    logits: str | Path | None = None,
    *,
    epoch: int = 0,
    seed: int = 0,
    views: int | None = None,
    render: bool = False,
) -> SoftLabels:
    """A subset's shards as a pipeline of `webdataset`, joined by id with a teacher's cached logits: for people who train with its stages.

    Each sample is a dict of its members as bytes (`jpg`, `png` or `webp`, ...), with `__key__`, `__url__`, and

    - `__id__`: its name in our tables; `cls`: its label as bytes, absent where there is none;
    - `logits`: the teacher's, of the view that the epoch shows, float32 of shape (c,); absent without a cache;
    - `box`: that view's top, left, height and width in the image's own pixels, int64 of shape (4,), and `flip`: bool, mirrored after that;
    - `weight`: how much the sample counts in the loss, a float, 1 where the subset has no weights;
    - with `render`, `image`: that very view, uint8 of shape (3, s, s).

    Epoch e (counted from 0, see `set_epoch`) shows view e mod V, V being `views`, or all that the cache has; without a cache a fresh one.
    Shards come in the order of `kdprune-data distill` for the same seed and epoch, the samples of one in the order of the tar: append
    `.shuffle(N)` to mix them, `.decode("pil")`, `.to_tuple(...)`, `.batched(N)` as you like. Nodes and workers get whole shards, as ever in
    webdataset: with more of them than shards some get none.

    Raises UsageError, MismatchError and FormatError as the readers of the two folders do; while it is read, SourceError for a shard that is
    not the one that was indexed.
    """
    if views is not None and views < 1:
        raise UsageError(f"views {views} is too small: at least 1, or None for all")
    data = Dataset.open(subset)
    source = view_source(data, logits, seed, views)
    now = torch.tensor(epoch).share_memory_()  # type: ignore[no-untyped-call]  # torch's stub lacks it
    return SoftLabels(Shards(data, seed, now), Join(data, source, data.weights, render), now)
