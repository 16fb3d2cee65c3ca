"""examples/: each runs as its own text says, is interrupted, and goes on with every batch shown once. Minutes: ResNet-18 on the CPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdprune_data import SoftLabelDataset

ROOT = Path(__file__).resolve().parents[1] / "examples"
SUBSET, CACHE = "subsets/random-0.5-s0", "logits/random-0.5-s0--resnet8-s0"

pytestmark = [pytest.mark.long, pytest.mark.skipif(not ROOT.exists(), reason="not a checkout")]


def test_plain_pytorch(chain_copy: Path) -> None:
    def ran(*words: object) -> str:
        command = [sys.executable, str(ROOT / "plain_pytorch.py"), SUBSET, CACHE, "--epochs", "2", "--batch", "16", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=chain_copy)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "stopped in epoch 1 after 13 samples" in ran("--stop-after", 5)
    again = ran("--workers", 2, "--test", "data/test")
    assert again.startswith("going on in epoch 1\nepoch 2/2: loss ")
    assert re.search(r"test accuracy [01]\.\d{4}", again)


@pytest.mark.filterwarnings("default")  # Lightning's own, of its configuration
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_lightning(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """In the middle of an epoch, and at its end."""
    pytest.importorskip("lightning", reason="pip install 'kdprune-data[examples]'")
    monkeypatch.chdir(chain)
    spec = importlib.util.spec_from_file_location("with_lightning", ROOT / "with_lightning.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    expected, dataset = [], SoftLabelDataset(SUBSET, CACHE, batch_size=16)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected += [(epoch, batch["id"]) for batch in dataset]
    words = [SUBSET, CACHE, "--epochs", "2", "--batch", "16"]
    first = example.main([*words, "--steps", str(steps), "--workers", "0", "--out", str(tmp_path / "first")])
    assert first.shown == expected[:steps]
    rest = example.main([*words, "--workers", "2", "--out", str(tmp_path / "rest"), "--ckpt", str(tmp_path / "first/last.ckpt")])
    assert rest.shown == expected[steps:]
