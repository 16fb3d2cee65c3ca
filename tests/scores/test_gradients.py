"""scores/gradients.py: exact gradient norms over all parameters, against a backward pass a sample, in float64, written out here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdprune_data.learn.models import build, resolve
from kdprune_data.scores import FROM_MODEL, gradients, layers

grand_full = FROM_MODEL["grand_full"]


def slow(net: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The definition: one sample, one backward pass, the length of all gradients together."""
    exact = copy.deepcopy(net).double().requires_grad_()
    norms = []
    for image, label in zip(images, labels, strict=True):
        exact.zero_grad()
        F.cross_entropy(exact(image[None].double()), label[None]).backward()
        norms.append(sum(float(p.grad.square().sum()) for p in exact.parameters() if p.grad is not None) ** 0.5)
    return norms


def some(n: int, size: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + size)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(classes, (n,), generator=generator)


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics, scales and shifts that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.3, generator=generator)
    return net.eval()


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that are taken, noted as they are."""
    ways: list[str] = []
    for name in ("_by_layers", "_by_vmap", "_by_sample"):
        own: Callable[..., Tensor] = getattr(gradients, name)
        monkeypatch.setattr(gradients, name, lambda *a, own=own, name=name: ways.append(name) or own(*a))
    return ways


@pytest.mark.parametrize(
    ("name", "size", "norm"),
    [
        ("resnet8", 16, "batch"),
        ("resnet20", 12, "group"),
        ("resnet18", 8, "batch"),
        ("mobilenet_v2", 32, "batch"),
        ("mobilenet_v3_small", 32, "batch"),
        ("densenet121", 32, "batch"),
        ("squeezenet1_1", 32, "batch"),
    ],
)
def test_against_a_pass_a_sample(monkeypatch: pytest.MonkeyPatch, name: str, size: int, norm: str) -> None:
    ways = taken(monkeypatch)
    net = settled(build(resolve(name, classes=5, size=size, norm=norm), seed=1))
    images, labels = some(2, size)
    found = grand_full(net, images, labels)
    assert found.tolist() == pytest.approx(slow(net, images, labels), rel=1e-4)
    assert (found.dtype, found.device.type, found.shape) == (torch.float64, "cpu", (2,))
    assert ways == ["_by_layers"]


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "vgg11_bn", "resnext50_32x4d", "vit_b_16", "convnext_tiny", "swin_t", "regnet_y_400mf"]
)
def test_larger_networks(name: str) -> None:
    net = settled(build(resolve(name, classes=5, size=32), seed=1))
    images, labels = some(2, 32)
    assert grand_full(net, images, labels).tolist() == pytest.approx(slow(net, images, labels), rel=1e-4)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(6, affine=False),
    "group": lambda: nn.GroupNorm(2, 6, affine=False),
    "layer": lambda: nn.LayerNorm([6, 9, 9], elementwise_affine=False),
    "layer without bias": lambda: nn.LayerNorm([6, 9, 9], bias=False),
    "batch without bias": lambda: without_bias(nn.BatchNorm2d(6)),
    "group without bias": lambda: without_bias(nn.GroupNorm(2, 6)),
}


def without_bias(layer: nn.Module) -> nn.Module:
    layer.bias = None
    return layer


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_layer_adds_only_the_parameters_it_has(monkeypatch: pytest.MonkeyPatch, kind: str, first: bool) -> None:
    ways = taken(monkeypatch)
    torch.manual_seed(5)
    norm = NORMS[kind]()
    layers = [nn.Conv2d(3, 6, 3), norm] if not first else [nn.InstanceNorm2d(3), nn.Conv2d(3, 6, 3), norm]
    net = nn.Sequential(*layers, *tail(6)).eval()
    images, labels = some(4, 11)
    assert grand_full(net, images, labels).tolist() == pytest.approx(slow(net, images, labels), rel=1e-4)
    assert ways == ["_by_layers"]


def tail(channels: int) -> list[nn.Module]:
    return [nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)]


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "oblong": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    "1x1": {"kernel_size": 1, "bias": False},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 5, "groups": 6, "padding": 2},
    "large": {"kernel_size": 7, "stride": 3, "padding": 3},
    "patches": {"kernel_size": 2, "stride": 2},
}


@pytest.mark.parametrize("way", ["cheapest", "_written_out", "_from_patches", "_from_shifts"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    """Every way gives the same, whichever is the cheapest."""
    torch.manual_seed(3)
    layer = nn.Conv2d(6, 12, **CONVOLUTIONS[name])
    if way != "cheapest":
        if (way != "_written_out" and layer.groups > 1) or (way == "_from_shifts" and set(layer.stride) != {1}):
            return
        monkeypatch.setattr(layers, "_way", lambda *_: (getattr(layers, way), 1000))
    net = nn.Sequential(nn.Conv2d(3, 6, 3), layer, *tail(12)).eval()
    images, labels = some(4, 11)
    assert grand_full(net, images, labels).tolist() == pytest.approx(slow(net, images, labels), rel=1e-4)


class Tokens(nn.Module):
    """Linear layers over tokens, with their norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.embed(images.flatten(2).transpose(1, 2)))
        found: Tensor = self.head(torch.relu(self.mix(tokens)).mean(1))
        return found


class Line(nn.Module):
    """One dimension: Conv1d and BatchNorm1d with and without a length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(3, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.AvgPool1d(4), nn.Flatten())
        self.end = nn.Sequential(nn.LazyLinear(6), nn.BatchNorm1d(6), nn.Tanh(), nn.GroupNorm(2, 6), nn.Linear(6, 5))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.end(self.layers(images.flatten(2)))
        return found


class Twice(nn.Module):
    """A convolution that is called twice: its gradients add up before their length is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Sequential(*tail(4))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.end(self.shared(torch.relu(self.shared(self.first(images)))))
        return found


class Tied(Twice):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.shared.weight

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.end(self.other(torch.relu(self.shared(self.first(images)))))
        return found


class Bare(Twice):
    """A parameter that no layer owns, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.full((4, 1, 1), 0.7)), nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.end(self.scale * self.shared(self.first(images)))
        return found


class Functional(Twice):
    """A layer's weight, used once by the layer and once beside it."""

    def forward(self, images: Tensor) -> Tensor:
        once = self.first(images)
        found: Tensor = self.end(self.shared(once) + F.conv2d(once, self.shared.weight, padding=1))
        return found


class Overwritten(Twice):
    """What a layer has read is changed in place."""

    def forward(self, images: Tensor) -> Tensor:
        once = self.first(images)
        said = self.shared(once)
        once.detach().mul_(0.5)
        found: Tensor = self.end(said)
        return found


class Steered(Bare):
    """A value of the data steers the code, which vmap cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = super().forward(images) if float(images.mean()) > 0 else super().forward(images * 2)
        return found


class Windows(Twice):
    """A layer that sees several pieces of each image as samples of their own."""

    def forward(self, images: Tensor) -> Tensor:
        n, _, h, w = images.shape
        pieces = self.first(images).view(n, 4, 2, h // 2, w).transpose(1, 2).reshape(2 * n, 4, h // 2, w)
        said = self.shared(pieces).view(n, 2, 4, h // 2, w).mean(1)
        found: Tensor = self.end(said)
        return found


class TokensFirst(Tokens):
    """Tokens before samples, and as many: the shapes alone do not tell them apart."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.embed(F.adaptive_avg_pool2d(images, 2).flatten(2).permute(2, 0, 1)))
        found: Tensor = self.head(torch.relu(self.mix(tokens)).mean(0))
        return found


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (lambda: TokensFirst(4), "_by_vmap"),
        (lambda: Tokens(4), "_by_layers"),
        (lambda: Tokens(40), "_by_layers"),
        (Line, "_by_layers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)), "_by_layers"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), *tail(4)), "_by_layers"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(inplace=True), *tail(3)), "_by_layers"),
        (Twice, "_by_vmap"),
        (Tied, "_by_vmap"),
        (Bare, "_by_vmap"),
        (Functional, "_by_vmap"),
        (Windows, "_by_vmap"),
        (Steered, "_by_sample"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), *tail(4)), "_by_vmap"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), *tail(4)), "_by_vmap"),
        (lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), *tail(3)), "_by_vmap"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), *tail(4)), "_by_vmap"),
    ],
)
def test_every_use_of_a_parameter_counts(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], way: str) -> None:
    torch.manual_seed(5)
    net, (images, labels) = make(), some(4, 8)
    net(images)  # a lazy layer learns its size
    settled(net)
    ways = taken(monkeypatch)
    assert grand_full(net, images, labels).tolist() == pytest.approx(slow(net, images, labels), rel=1e-4)
    assert ways[-1] == way


def test_what_is_overwritten_is_not_trusted() -> None:
    """The rules would read the changed values without a word; torch itself refuses it on every other way."""
    torch.manual_seed(6)
    net, (images, labels) = Overwritten().eval(), some(3, 8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grand_full(net, images, labels)


def test_batches_and_memory_change_nothing() -> None:
    """Not the number of samples at a time, nor the order, nor a last batch that is smaller."""
    net = settled(build(resolve("resnet8", classes=5, size=16), seed=2))
    images, labels = some(11, 16)
    whole = grand_full(net, images, labels)
    for memory in (1, 3_000_000, 10_000_000):
        torch.testing.assert_close(grand_full(net, images, labels, memory=memory), whole, rtol=1e-5, atol=0)
    parts = [grand_full(net, images[i : i + 4], labels[i : i + 4]) for i in range(0, 11, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=0)
    back = torch.arange(10, -1, -1)
    torch.testing.assert_close(grand_full(net, images[back], labels[back]), whole[back], rtol=1e-5, atol=0)
    assert grand_full(net, images[:0], labels[:0]).shape == (0,)


@pytest.mark.parametrize("kind", [Twice, Steered])
def test_the_other_ways_in_pieces(kind: type[nn.Module]) -> None:
    torch.manual_seed(7)
    net, (images, labels) = kind().eval(), some(7, 8)
    torch.testing.assert_close(grand_full(net, images, labels, memory=20_000), grand_full(net, images, labels), rtol=1e-5, atol=0)


def test_a_confident_network_keeps_its_digits() -> None:
    """Gradients of 1e-25, whose squares float32 cannot hold, and whose p of the label is 1 to all digits."""
    torch.manual_seed(8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *tail(4)).eval()
    images, _ = some(3, 8)
    with torch.no_grad():
        net[-1].bias.copy_(torch.tensor([60.0, 0, 0, 0, 0]))
    found = grand_full(net, images, torch.zeros(3, dtype=torch.int64))
    exact = copy.deepcopy(net).double()
    for image, norm in zip(images.double(), found.tolist(), strict=True):
        logits = exact(image[None])[0]
        loss = (logits[1:] - logits[0]).exp().sum().log1p()  # the cross-entropy, written so that float64 holds it
        parts = torch.autograd.grad(loss, list(exact.parameters()))
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in parts]).norm()), rel=1e-4)
        assert 0 < norm < 1e-20


def test_inference_mode_frozen_parameters_and_nothing_left_behind() -> None:
    net = settled(build(resolve("resnet8", classes=5, size=8), seed=3))
    images, labels = some(3, 8)
    expected = grand_full(net, images, labels)
    next(net.parameters()).requires_grad_(False)  # frozen: it counts all the same
    before = {name: (p.clone(), p.requires_grad, p.grad) for name, p in net.named_parameters()}
    with torch.inference_mode():
        inner = settled(build(resolve("resnet8", classes=5, size=8), seed=3))
        for other in (net, inner):
            assert torch.equal(grand_full(other, images.clone(), labels.clone()), expected)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert torch.equal(grand_full(net, images, labels), expected)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name][0])
        assert (p.requires_grad, p.grad) == before[name][1:]
    assert not any(layer._forward_hooks or layer.training for layer in net.modules())


def test_an_error_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one in the middle of the way back."""
    net = settled(build(resolve("resnet8", classes=5, size=8), seed=3))
    images, labels = some(3, 8)

    def broken(*_: object, **__: object) -> Tensor:
        raise KeyError("broken")

    monkeypatch.setattr(gradients, "squares", broken)
    with pytest.raises(KeyError, match="broken"):
        grand_full(net, images, labels)
    assert not any(layer._forward_hooks for layer in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        grand_full(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
