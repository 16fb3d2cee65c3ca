"""The recipes that come with the package: every section is a valid configuration, and every line says why."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

import pytest
from kdprune_pipelines.cache import CacheConfig
from kdprune_pipelines.distill import DistillConfig
from kdprune_pipelines.evaluate import EvaluateConfig
from kdprune_pipelines.select import SelectConfig
from kdprune_pipelines.teacher import TeacherConfig

from kdprune_data.learn import models

CONFIGS = {"teacher": TeacherConfig, "select": SelectConfig, "cache": CacheConfig, "distill": DistillConfig, "evaluate": EvaluateConfig}
FOLDER = Path(str(resources.files("kdprune_pipelines"))) / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
MODELS = {"teacher", "distill"}


def test_there_are_some() -> None:
    assert {p.stem for p in RECIPES} == {"small", "long", "photos", "few-steps"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_sections_are_configurations(path: Path) -> None:
    sections = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {"teacher", "cache", "distill"} <= sections.keys() <= CONFIGS.keys()
    for name, values in sections.items():
        required = {"model": "teachers/any"} if name == "evaluate" else {}
        config = CONFIGS[name].from_dict(required | values)
        if isinstance(config, TeacherConfig | DistillConfig):
            config.to_recipe()
            config.crops()
            models.resolve(config.model, classes=10, size=config.size or 32)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_functions_and_places_are_nobody_else_s(path: Path) -> None:
    """A packaged recipe runs no code of the user's and names no folder."""
    for values in tomllib.loads(path.read_text(encoding="utf-8")).values():
        assert not {"out", "name", "data", "val", "init", "weights", "code", "device", "overwrite"} & values.keys()
        assert ":" not in str(values.get("model", ""))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_says_what_it_is_and_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    head = " ".join(line.lstrip("# ") for line in text.split("\n[")[0].splitlines())
    assert "measured" in head


def test_small_is_the_defaults() -> None:
    sections = tomllib.loads((FOLDER / "small.toml").read_text(encoding="utf-8"))
    for name in ("teacher", "cache", "distill"):
        assert CONFIGS[name].from_dict(sections[name]) == CONFIGS[name]()
