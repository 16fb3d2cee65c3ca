"""learn/models.py and learn/resnet.py: every name builds, seeds decide, heads agree, and no file or shared name runs code."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdprune_data.errors import FormatError, MismatchError, SourceError, UsageError
from kdprune_data.learn.models import (
    CIFAR,
    LEAST_SIZE,
    Architecture,
    build,
    features,
    head,
    names,
    resolve,
)
from kdprune_data.learn.resnet import norm_layer, resnet
from kdprune_data.learn.weights import load_weights

TORCHVISION = [name for name in names() if name not in CIFAR]
REGNETS = [name for name in TORCHVISION if name.startswith("regnet")]
SMALL_REGNETS = ["regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf", "regnet_y_800mf"]


def made(name: str, *, classes: int = 5, size: int = 32, seed: int = 0, **settings: str) -> nn.Module:
    return build(resolve(name, classes=classes, size=size, **settings), seed=seed)


def on_meta(name: str, size: int, **settings: str) -> nn.Module:
    """Shapes without memory. A regnet computes its widths with tensors while it is made, so it is made on the CPU first."""
    if name in REGNETS:
        return made(name, size=size, **settings).to("meta")
    with torch.device("meta"):
        return made(name, size=size, **settings)


def output_shape(model: nn.Module, size: int) -> tuple[int, ...]:
    return tuple(model(torch.zeros(2, 3, size, size, device=next(model.parameters()).device)).shape)


def fitting(name: str) -> int:
    return 224 if name.startswith(("vit", "maxvit")) else 96


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- the CIFAR networks


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_parameters_are_those_of_he_et_al_table_6(depth: int, millions: float) -> None:
    count = sum(p.numel() for p in resnet(depth, 10).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)


@pytest.mark.parametrize("size", [1, 8, 15, 32])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_cifar_shapes(size: int, norm: str) -> None:
    assert output_shape(made("resnet8", size=size, norm=norm), size) == (2, 5)


def test_cifar_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = resnet(8, 10).layer2[0]
    for module in (block.bn1, block.bn2):
        nn.init.zeros_(module.weight)
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_cifar_depth_is_6n_plus_2(depth: int) -> None:
    with pytest.raises(UsageError, match="6n"):
        resnet(depth, 10)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (16, 8), (24, 12), (37, 1), (64, 32), (96, 32), (2048, 32)])
def test_groups_divide_the_channels_and_hold_two_or_more(channels: int, groups: int) -> None:
    layer = norm_layer("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


# --- names and architectures


@pytest.mark.parametrize(("name", "nearest"), [("resnet-20", "resnet20"), ("resnt18", "resnet18"), ("vit_b16", "vit_b_16")])
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown model '{name}'; did you mean '{nearest}'\?"):
        resolve(name, classes=10, size=32)


@pytest.mark.parametrize(
    ("name", "size", "stem", "expected"),
    [
        ("resnet18", 32, "auto", "small"),
        ("resnet18", 64, "auto", "small"),
        ("resnet18", 65, "auto", "standard"),
        ("resnet18", 32, "standard", "standard"),
        ("densenet121", 32, "auto", "small"),
        ("resnet20", 32, "auto", "standard"),
        ("resnet20", 32, "small", "standard"),
        ("mobilenet_v2", 32, "auto", "standard"),
        ("my.models:tiny", 32, "auto", "standard"),
        ("vit_own:tiny", 8, "auto", "standard"),
    ],
)
def test_stem(name: str, size: int, stem: str, expected: str) -> None:
    arch = resolve(name, classes=10, size=size, stem=stem)
    assert arch.stem == expected
    assert Architecture.from_dict(arch.to_dict()) == arch


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vgg11", {"stem": "small"}, "resnet, resnext, wide_resnet, densenet"),
        ("my.models:tiny", {"stem": "small"}, "no small stem"),
        ("resnet18", {"stem": "tiny"}, "unknown stem 'tiny'.* known: auto, small, standard"),
        ("resnet20", {"norm": "layer"}, "unknown norm 'layer'"),
        ("resnet20", {"classes": 0}, "classes is 0: at least 1"),
        ("resnet20", {"size": 1.5}, "size is 1.5: expected int"),
        ("vit_b_16", {"size": 33}, "a multiple of 16; give --size 48"),
        ("vit_h_14", {"size": 224 + 1}, "a multiple of 14; give --size 238"),
        ("maxvit_t", {"size": 32}, "a multiple of 224; give --size 224"),
        ("alexnet", {"size": 32}, "at least 63"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_made(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(name, **{"classes": 10, "size": 32, **settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 20}, "unknown architecture key 'depth'"),
        ({"classes": True}, "classes is True"),
        ({"size": "32"}, "size is '32'"),
        ({"stem": "auto"}, "unknown stem"),
        ({"norm": None}, "norm is None"),
    ],
)
def test_an_architecture_that_a_file_has_wrong(change: dict[str, object], message: str) -> None:
    good = Architecture("resnet20", 10, 32).to_dict()
    with pytest.raises(FormatError, match=message):
        Architecture.from_dict({**good, **change})
    with pytest.raises(FormatError, match="no 'name'"):
        Architecture.from_dict({key: value for key, value in good.items() if key != "name"})


# --- torchvision


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in REGNETS and name not in SMALL_REGNETS else name for name in TORCHVISION],
)
def test_every_torchvision_classifier_builds_and_runs(name: str) -> None:
    size = fitting(name)
    assert output_shape(on_meta(name, size), size) == (2, 5)


@pytest.mark.parametrize("name", ["alexnet", "convnext_tiny", "densenet121", "googlenet", "inception_v3", "vgg11_bn"])
def test_least_sizes_are_the_least(name: str) -> None:
    least = next(n for k, n in LEAST_SIZE.items() if name.startswith(k))
    model = on_meta(name, least, stem="standard").eval()
    assert output_shape(model, least) == (2, 5)
    with pytest.raises(RuntimeError):
        output_shape(model, least - 1)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_small_stem_keeps_the_pixels(name: str, norm: str) -> None:
    model = on_meta(name, 32, norm=norm)
    stem, first = (model.features, model.features.denseblock1) if "dense" in name else (model, model.layer1)
    conv = stem.conv0 if "dense" in name else stem.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    sides = []
    first.register_forward_hook(lambda *seen: sides.append(tuple(seen[2].shape[-2:])))
    assert output_shape(model, 32) == (2, 5)
    assert sides == [(32, 32)]
    assert any(isinstance(m, nn.GroupNorm) for m in model.modules()) == (norm == "group")
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (norm == "batch")


def test_group_norm_where_there_is_nothing_to_replace() -> None:
    with pytest.raises(UsageError, match="vgg11 has no batch norm"):
        on_meta("vgg11", 32, norm="group")


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_weights_follow_from_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = made(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same(one, made(name, seed=1))
    assert not same(one, made(name, seed=2))


def test_timm_is_an_extra() -> None:
    try:
        import timm  # noqa: F401 - only whether it is there
    except ImportError:
        with pytest.raises(UsageError, match=re.escape("pip install 'kdprune-data[timm]'")):
            resolve("timm/resnet18", classes=10, size=32)
        return
    assert output_shape(made("timm/resnet18"), 32) == (2, 5)
    for name in ("timm/resnet18x", "timm/hf-hub:someone/resnet18"):
        with pytest.raises(UsageError, match="timm has no model"):
            resolve(name, classes=10, size=32)


# --- features


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [("resnet20", 8, 64), ("resnet18", 32, 512), ("mobilenet_v3_small", 32, 1024), ("vit_b_32", 32, 768), ("swin_t", 32, 768)],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_head_makes_the_logits_of_the_embedding(name: str, size: int, width: int, training: bool) -> None:
    model = made(name, size=size).train(training)
    last = head(model)
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight)  # a fresh vit's is zero
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding, logits = features(model, images)
        assert embedding.shape == (3, width)
        assert logits.shape == (3, 5)
        torch.testing.assert_close(embedding @ last.weight.T + last.bias, logits)
    assert not last._forward_hooks
    assert not last._forward_pre_hooks


def test_a_convolution_as_head() -> None:
    model = made("squeezenet1_1").eval()
    embedding, logits = features(model, torch.rand(3, 3, 32, 32))
    assert embedding.shape == (3, 512)
    assert logits.shape == (3, 5)


class Average(nn.Module):
    """Two heads, of whose outputs it returns the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one(x.flatten(1)) + self.two(x.flatten(1))) / 2


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 5, 1)),
        nn.Sequential(nn.Linear(2, 5)),
        Average(),
    ],
)
def test_a_model_without_an_embedding_is_refused(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no embedding"):
        features(model, torch.rand(4, 3, 2, 2))
    assert not any(module._forward_hooks for module in model.modules())


# --- weights in files


@pytest.mark.parametrize("name", ["resnet8", "mnasnet0_5", "squeezenet1_1"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_round_trip(tmp_path, name: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    one, two = made(name, seed=1), made(name, seed=2)
    save = save_file if suffix == ".safetensors" else torch.save
    save(one.state_dict(), path)
    load_weights(two, path)
    assert same(one, two)


@pytest.mark.parametrize("wrapper", [[], ["state_dict"], ["model_state_dict"], ["model"], ["net"], ["model", "state_dict"]])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_are_unwrapped(tmp_path, wrapper: list[str], prefix: str) -> None:
    one, two = made("resnet8", seed=1), made("resnet8", seed=2)
    # The batch counters are left out, as in files from before torch 0.4.1.
    found: dict[str, object] = {prefix + k: v for k, v in one.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key in wrapper:
        found = {key: found, "epoch": 3}
    torch.save(found, tmp_path / "last.pth")
    load_weights(two, tmp_path / "last.pth")
    assert same(one, two)


def test_a_prefix_that_the_model_has_too_stays(tmp_path) -> None:
    one, two = (nn.ModuleDict({"module": made("resnet8", seed=seed)}) for seed in (1, 2))
    torch.save(one.state_dict(), tmp_path / "last.pth")
    load_weights(two, tmp_path / "last.pth")
    assert same(one, two)


@pytest.mark.parametrize(
    ("other", "messages"),
    [
        ({"classes": 7}, ["tells 7 classes apart and this model 5: use weights of the same classes, or train on from these"]),
        ({"norm": "group"}, ["missing 'bn1.running_mean', 'bn1.running_var', 'layer1.0.bn1.running_mean' and 11 more"]),
        ({"name": "resnet14"}, ["unexpected 'layer1.1.bn1.num_batches_tracked'", "and 33 more"]),
    ],
)
def test_another_models_weights_are_refused_whole_in_one_line(tmp_path, other: dict[str, str], messages: list[str]) -> None:
    path = tmp_path / "other.safetensors"
    save_file(made(**{"name": "resnet8", "seed": 1, **other}).state_dict(), path)
    model = made("resnet8")
    with pytest.raises(MismatchError) as caught:
        load_weights(model, path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith("--init in the place of --weights" if "classes" in other else "check --model and --norm")
    assert all(message in text for message in messages), text
    assert same(model, made("resnet8"))


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: object) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path) -> None:
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    torch.save({"state_dict": Trap(sprung)}, path)
    with pytest.raises(SourceError, match=r"could run any code; save model\.state_dict\(\) alone$"):
        load_weights(made("resnet8"), path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # so it was a trap


def itself() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["model"] = loop
    return loop


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"hello world\n" * 9, b"\x80\x02}q\x00.", b"\x08" + b"\x00" * 7 + b"{}      "])
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((SourceError, MismatchError)) as caught:
        load_weights(made("resnet8"), tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model": 7}, {3: torch.zeros(1)}, itself()])
def test_a_checkpoint_without_weights(tmp_path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"save model\.state_dict\(\)"):
        load_weights(made("resnet8"), tmp_path / "w.pth")


# --- the user's own function

OWN = """
from pathlib import Path
from torch import nn
Path("ran").touch()
def net(classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
def text(classes): return "net"
def broken(classes): raise RuntimeError("no\\nluck")
"""


def own(tmp_path, monkeypatch, module: str, text: str = OWN) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_own_code_runs_only_when_named(tmp_path, monkeypatch) -> None:
    own(tmp_path, monkeypatch, "kdprune_own_a")
    name = "kdprune_own_a:net"
    arch = Architecture.from_dict(resolve(name, classes=4, size=2).to_dict())
    for code in (None, "", "kdprune_own_a", "kdprune_own_a:text", "os:getcwd"):
        with pytest.raises(UsageError, match=f"name it with --code {name} to let it run"):
            build(arch, seed=0, code=code)
    assert not (tmp_path / "ran").exists()
    model = build(arch, seed=0, code=name)
    assert output_shape(model, 2) == (2, 4)
    assert same(model, build(arch, seed=0, code=name))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("kdprune_own_b:text", "returned str, not a torch.nn.Module"),
        ("kdprune_own_b:broken", "RuntimeError: no$"),
        ("kdprune_own_b:absent", "AttributeError"),
        ("kdprune_own_nowhere:net", "ModuleNotFoundError"),
        (":net", "ValueError"),
    ],
)
def test_own_code_that_fails_is_one_line(tmp_path, monkeypatch, function: str, message: str) -> None:
    own(tmp_path, monkeypatch, "kdprune_own_b")
    with pytest.raises(UsageError, match=message) as caught:
        build(resolve(function, classes=4, size=2), seed=0, code=function)
    assert "\n" not in str(caught.value)
