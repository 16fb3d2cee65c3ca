"""For the stages that learn: a shard without labels."""

from __future__ import annotations

import tarfile
from pathlib import Path

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
