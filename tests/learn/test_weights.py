"""Files of weights of the kinds that people have: read whole into the model they are of, or refused with what to do."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as zoo

from kdprune_data.errors import KdpruneError, MismatchError, SourceError, UsageError
from kdprune_data.learn.models import build, resolve
from kdprune_data.learn.weights import load_weights

State = dict[str, Tensor]


def made(name: str = "resnet8", *, seed: int = 0, classes: int = 5, size: int = 32, stem: str = "auto") -> nn.Module:
    return build(resolve(name, classes=classes, size=size, stem=stem), seed=seed)


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def behind(prefix: str, found: State) -> State:
    return {prefix + name: value for name, value in found.items()}


OPTIONS = argparse.Namespace(lr=0.1, model="resnet8")
CHECKPOINTS: dict[str, Callable[[State], Any]] = {
    "Lightning": lambda own: {"state_dict": behind("model.", own), "epoch": 3, "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    "a backbone": lambda own: behind("backbone.", own),
    "the script of torchvision": lambda own: {"model": own, "optimizer": {"state": {0: {}}, "param_groups": []}, "args": OPTIONS},
    "the script of timm": lambda own: {"epoch": 3, "arch": "resnet8", "state_dict": own, "args": OPTIONS, "metric": 50.0},
    "ImageNet's example": lambda own: {"state_dict": behind("module.", own), "best_acc1": torch.tensor(3.0), "scheduler": {}},
    "an average": lambda own: behind("module.", own) | {"n_averaged": torch.tensor(3)},
    "another key": lambda own: {"params": own, "metrics": {"accuracy": torch.tensor(0.5)}},
    "parameters": lambda own: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in own.items()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    one, two = made(seed=1), made(seed=2)
    torch.save(CHECKPOINTS[kind](one.state_dict()), tmp_path / "w.pth.tar")
    load_weights(two, tmp_path / "w.pth.tar")
    assert same(one, two)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_the_suffix_decides_nothing(tmp_path: Path, suffix: str, save: Callable[..., Any]) -> None:
    one, two = made(seed=1), made(seed=2)
    save(one.state_dict(), tmp_path / f"w{suffix}")
    load_weights(two, tmp_path / f"w{suffix}")
    assert same(one, two)


def test_of_several_sets_one_is_chosen(tmp_path: Path) -> None:
    path, one, average = tmp_path / "w.pth", made(seed=1), made(seed=3)
    torch.save({"state_dict": one.state_dict(), "state_dict_ema": {"module": 1, "model": average.state_dict()}, "epoch": 3}, path)
    two = made(seed=2)
    load_weights(two, path)  # the average stands deeper
    assert same(one, two)
    torch.save({"state_dict": one.state_dict(), "ema": behind("module.", average.state_dict()), "epoch": 3}, path)
    with pytest.raises(SourceError, match=r"holds 2 sets of weights \('state_dict', 'ema'\): choose with --weights-key"):
        load_weights(two, path)
    assert same(one, two)
    load_weights(two, path, key="ema")
    assert same(average, two)
    with pytest.raises(UsageError, match=r"--weights-key emma is not in .*w\.pth, which has 'state_dict', 'ema', 'epoch'"):
        load_weights(two, path, key="emma")
    save_file(one.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="--weights-key ema is for checkpoints"):
        load_weights(two, tmp_path / "w.safetensors", key="ema")


def old_densenet(own: State) -> State:
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in own.items()}


def old_transformer(own: State) -> State:
    return {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in own.items()}


def with_training_heads(own: State) -> State:
    trained: State = zoo.googlenet(num_classes=5, aux_logits=True, init_weights=False).state_dict()
    return trained | own


@pytest.mark.parametrize(
    ("name", "as_given_away"), [("densenet121", old_densenet), ("vit_b_32", old_transformer), ("googlenet", with_training_heads)]
)
def test_the_names_in_torchvision_s_own_files(tmp_path: Path, name: str, as_given_away: Callable[[State], State]) -> None:
    one, two = made(name, seed=1), made(name, seed=2)
    given = as_given_away(dict(one.state_dict()))
    assert given.keys() != one.state_dict().keys()
    torch.save(given, tmp_path / "w.pth")
    load_weights(two, tmp_path / "w.pth")
    assert same(one, two)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"name": "resnet18", "stem": "standard"}, {"name": "resnet18"}, "the other first layer: give --stem standard"),
        ({"name": "resnet18"}, {"name": "resnet18", "stem": "standard"}, "the other first layer: give --stem small"),
        ({"name": "vit_b_32", "size": 96}, {"name": "vit_b_32", "size": 64}, "for images of another size: give --size 96"),
        (
            {"name": "resnet18", "stem": "standard", "classes": 1000},
            {"name": "resnet18"},
            "give --stem standard; it tells 1,000 classes apart and this model 5",
        ),
        ({"name": "resnet20"}, {}, "check --model and --norm"),
    ],
)
def test_what_makes_shapes_fit_is_said(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], said: str) -> None:
    torch.save(made(**theirs).state_dict(), tmp_path / "w.pth")
    with pytest.raises(MismatchError) as caught:
        load_weights(made(**ours), tmp_path / "w.pth")
    assert str(caught.value).endswith(said)


def test_a_part_of_a_checkpoint_is_pointed_at(tmp_path: Path) -> None:
    torch.save({"state_dict": behind("net.", made().state_dict()) | {"loss.weight": torch.ones(5)}}, tmp_path / "w.ckpt")
    with pytest.raises(MismatchError, match=r"stands behind 'net\.', beside other things: save that part's state_dict\(\) alone$"):
        load_weights(made(), tmp_path / "w.ckpt")


class Sprung(nn.Linear):
    """A network that tells when it is unpickled."""

    loaded = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        Sprung.loaded = True
        super().__setstate__(state)


@pytest.mark.parametrize("wrapped", [lambda net: net, lambda net: {"model": net}, lambda net: {"args": argparse.Namespace(net=net)}])
def test_a_whole_module_is_refused_without_being_loaded(tmp_path: Path, wrapped: Callable[[nn.Module], Any]) -> None:
    torch.save(wrapped(Sprung(3, 2)), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"asks for \S*Sprung, and loading that could run any code; save model\.state_dict\(\) alone$"):
        load_weights(made(), tmp_path / "w.pth")
    assert not Sprung.loaded
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert Sprung.loaded  # so it would have told
    Sprung.loaded = False


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"is a TorchScript program; save the state_dict\(\)"):
        load_weights(made(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pointer_is_no_file_of_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SourceError, match="is a pointer of Git LFS, not the file that it stands for; run git lfs pull"):
        load_weights(made(), tmp_path / name)


def test_a_new_last_layer_is_the_model_s(tmp_path: Path) -> None:
    one, two, fresh = made(seed=1, classes=7), made(seed=2), made(seed=2)
    save_file(one.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(KdpruneError, match="tells 7 classes apart and this model 5"):
        load_weights(two, tmp_path / "w.safetensors")
    assert same(two, fresh)
    assert load_weights(two, tmp_path / "w.safetensors", new_head=True) == 7
    from_one, from_fresh = one.state_dict(), fresh.state_dict()
    for name, value in two.state_dict().items():
        assert torch.equal(value, (from_fresh if name.startswith("linear.") else from_one)[name])
    assert load_weights(two, tmp_path / "w.safetensors", new_head=True) == 7
    assert load_weights(one, tmp_path / "w.safetensors", new_head=True) is None
