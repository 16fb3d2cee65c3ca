"""For the stages: a shard without labels, and a workspace in which everything is scored."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def unlabelled(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of the 40 digits of the first training shard, without their `.cls` members."""
    path = tmp_path_factory.mktemp("bare") / "bare.tar"
    with tarfile.open(chain / "data/train/shard-000000.tar") as labelled, tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as bare:
        for member in labelled:
            if not member.name.endswith(".cls"):
                bare.addfile(member, labelled.extractfile(member))
    return path


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, few_digits: Path, kdprune: Callable[..., Any]) -> Path:
    """A workspace of 120 digits in 3 shards with every score, embeddings and logits; its subsets are nobody's to rely on."""
    workspace = tmp_path_factory.mktemp("scored")
    for line in (
        ["import", few_digits / "train", "--shard-samples", "40"],
        ["teacher", "--model", "resnet8", "--epochs", "3", "--batch", "16", "--record", "logits"],
        ["score", "--embedding", "--logits", "--also", "all"],
    ):
        ran = kdprune(*line, cwd=workspace)
        assert ran.code == 0, ran.err
    return workspace
