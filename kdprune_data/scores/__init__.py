"""Pruning scores, one definition a function: how hard, informative or well learned each sample is. Numbers in, a number a sample out.

Four tables. `FROM_OUTPUTS` takes what one network says of a batch; `FROM_DYNAMICS` what it said of every sample in every epoch of its
training; `FROM_EMBEDDING` the embeddings of all samples; `FROM_MODEL` the network itself. Which end of each is hard, and which checkpoint
it is read from, stands in `kdprune_data.formats.scores.SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kdprune_data.scores.dynamics import FROM_DYNAMICS, DynamicsScore, History
from kdprune_data.scores.embedding import FROM_EMBEDDING, Embedded, EmbeddingScore
from kdprune_data.scores.gradients import grand_full
from kdprune_data.scores.outputs import FROM_OUTPUTS, Outputs

__all__ = [
    "FROM_DYNAMICS",
    "FROM_EMBEDDING",
    "FROM_MODEL",
    "FROM_OUTPUTS",
    "DynamicsScore",
    "Embedded",
    "EmbeddingScore",
    "History",
    "Outputs",
]
FROM_MODEL: dict[str, Callable[..., Tensor]] = {"grand_full": grand_full}
