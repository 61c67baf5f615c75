"""Cold start on a base model, or on a DeScore whose training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import load
from launch.cold_start import build_reward_model, build_task
from launch.schemas.training import ColdStartRun
from rm.model import DeScore
from tests.launch.processes import ROOT
from tests.tiny_qwen import SETTINGS, TEMPLATE, save_tiny_qwen


def run_of(*words: str) -> ColdStartRun:
    return load(ColdStartRun, ROOT / "configs" / "shapes" / "cold_start.yaml", words)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeScore with a query and a head that no seed gives."""
    folder = tmp_path_factory.mktemp("descore")
    base = save_tiny_qwen(folder / "base")
    model = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS)
    with torch.no_grad():
        model.query.fill_(0.25)
        model.head.weight.fill_(-0.5)
    model.save(folder / "final")
    return folder / "final"


def test_training_goes_on_with_query_and_head(checkpoint: Path) -> None:
    """The base is not read: it does not exist."""
    run = run_of(
        f"checkpoint={checkpoint}",
        "base=nowhere",
        "template=no.json",
        "generation.max_new_tokens=7",
    )
    model = build_reward_model(run)
    assert torch.equal(model.query, torch.full_like(model.query, 0.25))
    assert torch.equal(model.head.weight, torch.full_like(model.head.weight, -0.5))
    assert model.settings == SETTINGS
    assert model.template == TEMPLATE
    assert model.generation == run.generation


def test_without_a_checkpoint_the_head_is_new(checkpoint: Path) -> None:
    model = build_reward_model(run_of(f"base={checkpoint}"))
    assert not torch.equal(model.head.weight, torch.full_like(model.head.weight, -0.5))


def test_other_dimensions_are_refused(checkpoint: Path) -> None:
    words = (f"checkpoint={checkpoint}", "dimensions={VQ: {}}")
    with pytest.raises(ValueError, match=r"has the dimensions \['overall'\]"):
        build_reward_model(run_of(*words))


@pytest.mark.parametrize("key", ["base", "checkpoint"])
def test_missing_model_is_named_before_videos_are_decoded(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(f"{key}=/nowhere/model", "cold_start.pairs_per_step=8")
    with pytest.raises(SystemExit) as stopped:
        build_task(run, [], [])
    assert stopped.value.code == 2
    assert f"{key}: /nowhere/model does not exist" in capsys.readouterr().err
