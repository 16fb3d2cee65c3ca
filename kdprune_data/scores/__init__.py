"""Pruning scores, one definition a file: how hard, informative or well learned each sample is. Tensors in, tensors out.

Two tables. `FROM_OUTPUTS` takes what one network says of a batch; `FROM_DYNAMICS` takes what it said of every sample in every epoch.
Which end of each is hard, and which checkpoint it is read from, stands in `kdprune_data.formats.scores.SCORES`.
"""

from __future__ import annotations

from kdprune_data.scores.dynamics import FROM_DYNAMICS, History
from kdprune_data.scores.outputs import FROM_OUTPUTS, Outputs

__all__ = ["FROM_DYNAMICS", "FROM_OUTPUTS", "History", "Outputs"]
