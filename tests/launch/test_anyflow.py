"""A GRPO run of a flow map: what its config refuses, and how it is measured on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from common.config import ConfigError, load
from generator.anyflow import load_generator
from generator.config import SamplerConfig
from generator.family import Family
from launch.diagnosis.watch import Watch
from launch.evaluation.heldout import gap_of_map, score_heldout
from launch.schemas.training import GrpoRun
from tests.fakes import FunctionReward, redness
from tests.generator.families import build_anyflow
from tests.tiny import tiny_config

RECIPE = Path(__file__).parents[2] / "configs" / "shapes" / "grpo_anyflow.yaml"
ANCHOR = "generator.sampler.kernel=anchor"
PROMPTS = ["a red circle", "rain"]


def test_anchor_has_weights_of_large_steps() -> None:
    with pytest.raises(ConfigError, match=r"reweight=finite.*set it to unit"):
        load(GrpoRun, RECIPE, [ANCHOR])
    run = load(GrpoRun, RECIPE, [ANCHOR, "grpo.reweight=unit"])
    assert run.generator.sampler.kernel == "anchor"


def test_measured_in_other_numbers_of_jumps(tmp_path: Path) -> None:
    """eval has sample_steps jumps, eval_1 has one; the gap is that of the same noise."""
    folder = build_anyflow(tmp_path / "anyflow")
    sampler = SamplerConfig(num_steps=16, shift=5.0, guidance_scale=1.0, sample_steps=2)
    generator = load_generator(tiny_config(folder, sampler=sampler), device="cpu")
    seen: list[int] = []
    generator.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    red = FunctionReward("red", redness)
    rows = score_heldout(
        generator,
        {"red": red},
        PROMPTS,
        seed=3,
        stock=False,
        folder=tmp_path / "videos",
        videos=0,
        steps=(1, 4),
    )
    assert list(rows) == ["eval", "eval_1", "eval_4"]
    assert len(seen) == 2 + 1 + 4
    values = [[row["red"] for row in rows[name]] for name in rows]
    assert values[0] != values[1] != values[2]
    gap = gap_of_map(generator, PROMPTS, seed=3)
    assert 0.01 < gap["eval/map_gap"] < 10


@pytest.mark.parametrize(
    ("family", "measured"),
    [
        (Family(), True),
        (Family(flow_map=True), False),
        (Family(experts=("transformer", "transformer_2"), boundary=0.9), False),
        (Family(image="channels"), False),
    ],
)
def test_only_a_plain_wan_is_measured_by_another_route(
    family: Family, *, measured: bool
) -> None:
    """That route calls the transformer with one time: a run of a flow map ended there."""
    generator = SimpleNamespace(family=family, module=nn.Linear(2, 2))
    loop = SimpleNamespace(generator=generator)
    watch = SimpleNamespace(run=load(GrpoRun, RECIPE), loop=loop)
    assert Watch._can_measure(watch) is measured
