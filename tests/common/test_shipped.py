"""Files of the project, found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.rewards import factory_of
from common.config import load
from common.shipped import ROOT, resolve_assets
from launch.schemas.training import GrpoRun


def test_recipe_of_the_tiny_models_loads_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = load(GrpoRun, "configs/shapes/grpo_oracle.yaml")
    assert (Path(run.generator.path) / "model_index.json").is_file()
    assert Path(run.prompts).is_file()
    # the oracle's file as well
    assert callable(factory_of("oracle", run.rewards["oracle"]))


def test_assets_of_a_checkout_keep_their_relative_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    settings = {"a": ["assets/shapes/wan", 3], "b": "assets/absent", "c": "my/file"}
    assert resolve_assets(settings) == settings
