"""learn/precision.py and learn/memory.py: folded networks say the same, those in bf16 nearly; what cannot be folded or cast falls back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdprune_data.errors import UsageError
from kdprune_data.learn.heads import features, head
from kdprune_data.learn.memory import sent
from kdprune_data.learn.models import build, resolve
from kdprune_data.learn.precision import Autocast, Cast, fold, in_bf16

CPU = torch.device("cpu")


def _huge_pages() -> str:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.read_text(encoding="ascii") if file.is_file() else ""


def network(name: str = "resnet8", size: int = 16, **settings: str) -> nn.Module:
    """In eval mode, with norms that have seen something."""
    net = build(resolve(name, classes=10, size=size, **settings), seed=0)
    with torch.no_grad():
        net.train()(torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1)))
    return net.eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(2))


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class Twice(nn.Module):
    """A convolution that is read twice: before its norm, and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.linear((x + self.bn(x)).mean((2, 3)))


class Steered(Twice):
    """Code that depends on the numbers, which no tracing follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() < 100 else -x)


class Mixed(Twice):
    """Code of float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Stubborn(Twice):
    """Code that takes no other numbers, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            raise TypeError("float32 only")
        return super().forward(x)


@pytest.mark.parametrize(
    ("name", "size", "left"), [("resnet8", 16, 0), ("resnet18", 32, 0), ("mobilenet_v2", 32, 0), ("densenet121", 32, 62)]
)
def test_norms_are_folded_into_the_convolutions_that_they_alone_read(name: str, size: int, left: int) -> None:
    net = network(name, size)
    folded = fold(net)
    with torch.no_grad():
        assert torch.allclose(folded(images(size)), net(images(size)), rtol=1e-3, atol=1e-4)
    assert (norms(net) > left, norms(folded)) == (True, left)


def test_a_convolution_with_another_reader_is_left_alone() -> None:
    net = Twice().eval()
    assert norms(fold(net)) == 1
    with torch.no_grad():
        assert torch.equal(fold(net)(images()), net(images()))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_what_is_said_in_bf16(norm: str) -> None:
    """Nearly the same, as float32; the last layer's weights keep all their digits; the network itself is untouched."""
    net = network(norm=norm)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    low = in_bf16(net, size=16, device=CPU, tell=pytest.fail)
    with torch.inference_mode():
        (h, z), (low_h, low_z) = features(net, images()), features(low, images())
    assert (low_h.dtype, low_z.dtype) == (torch.float32, torch.float32)
    assert torch.equal(head(low).weight, head(net).weight)
    assert {p.dtype for p in low.parameters() if p.ndim == 4} == {torch.bfloat16}
    off = float((low_z - z).norm() / z.norm())
    assert 1e-4 < off < 2e-2
    assert float((low_h - h).norm() / h.norm()) < 2e-2
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "way", "said"),
    [
        (Twice, Cast, ""),
        (Steered, Cast, "Steered in bf16: its batch norms stay as they are, for they cannot be folded"),
        (Mixed, Autocast, "Mixed in bf16: under autocast, for its weights cannot be cast"),
    ],
)
def test_what_cannot_be_folded_or_cast_falls_back(kind: type[nn.Module], way: type[nn.Module], said: str) -> None:
    net, told = kind().eval(), list[str]()
    low = in_bf16(net, size=16, device=CPU, tell=told.append)
    assert (type(low), "".join(told)) == (way, said)
    with torch.inference_mode():
        assert low(images()).dtype == torch.float32
        assert torch.allclose(low(images()), net(images()), atol=0.03)


def test_what_does_not_run_in_bf16_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^Stubborn does not run in bf16 \(TypeError: float32 only\): leave out --precision bf16$"):
        in_bf16(Stubborn().eval(), size=16, device=CPU, tell=pytest.fail)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
@pytest.mark.skipif("[always]" in _huge_pages(), reason="pages are huge: faults do not tell how much memory is new")
@pytest.mark.parametrize("theirs", [{}, {"MALLOC_MMAP_THRESHOLD_": "65536"}], ids=["no settings", "the user's settings"])
def test_freed_memory_is_kept(theirs: dict[str, str]) -> None:
    """What is taken again does not come anew from the kernel, unless the user has settings of the allocator."""
    code = (
        "import resource, torch\nfrom kdprune_data.learn.inference import choose_device\nchoose_device('cpu')\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\nfor _ in range(40):\n    [torch.ones(8_000_000) for _ in range(4)]\n"
        "print((faults() - before) * resource.getpagesize())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | theirs)
    anew = int(done.stdout) / (4 * 32_000_000)  # how many of the forty times all was of new memory
    assert anew > 20 if theirs else anew < 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_large_blocks_are_given_back() -> None:
    """Those of more than 32 MB: kept with something small behind each, they would add up."""
    code = (
        "from kdprune_data.learn.inference import choose_device\nchoose_device('cpu')\nimport torch\n"
        "def taken(): return 4096 * int(open('/proc/self/statm').read().split()[1])\n"
        "before, small = taken(), []\nfor _ in range(20):\n    torch.ones(20_000_000)\n    small.append(torch.ones(3))\n"
        "print(taken() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 80_000_000


def test_a_tensor_that_is_sent_is_the_same() -> None:
    there = torch.arange(12).reshape(3, 4)
    assert torch.equal(sent(there.T, CPU), there.T)
