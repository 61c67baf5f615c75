"""The plan as the first estimate of a step."""

from __future__ import annotations

import pytest
import torch

from common.config import load
from launch.planning.first_estimate import planned_seconds
from launch.planning.plan import DEVICES, Where
from launch.planning.runs import plan_grpo
from launch.schemas.pairs import DpoRun
from launch.schemas.training import GrpoRun
from tests.launch.processes import ROOT


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch) -> GrpoRun:
    monkeypatch.chdir(ROOT)
    monkeypatch.chdir(ROOT)
    # Without a reward model, which would take longer to plan.
    words = ["rewards.descore=null", "rewards.brightness.weight=1"]
    return load(GrpoRun, ROOT / "configs" / "shapes" / "grpo.yaml", words)


@pytest.mark.slow
def test_estimate_is_the_plan_of_the_gpu_and_draws_no_numbers(grpo: GrpoRun) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    seconds = planned_seconds(grpo, "NVIDIA A100-SXM4-80GB", 2)
    assert torch.equal(torch.rand(2), want)
    assert seconds == plan_grpo(grpo, Where(DEVICES["a100"], 2)).seconds > 0


def test_unknown_gpu_has_no_estimate(grpo: GrpoRun) -> None:
    assert planned_seconds(grpo, "Tesla T4", 1) is None


def test_unknown_model_has_no_estimate() -> None:
    cfg = load(
        DpoRun,
        ROOT / "configs" / "wan" / "dpo.yaml",
        ["generator.path=no/such-model"],
    )
    assert planned_seconds(cfg, "NVIDIA H100 80GB HBM3", 1) is None
