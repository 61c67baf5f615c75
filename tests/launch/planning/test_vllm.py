"""The plan's vLLM: caches by hand, how many chains of thought run together, memory and seconds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.config import load
from launch.planning.models import Lengths, MetaRewardModel, sizes_of
from launch.planning.plan import DEVICES, Plan, Where
from launch.planning.runs import plan_reward_model
from launch.planning.vllm import cache_bytes, share_of
from launch.schemas.training import DualRlRun
from tests.launch.processes import ROOT

GIB = 2.0**30
H100 = Where(DEVICES["h100"], ranks=8)
LENGTHS = Lengths((5, 20, 36), 900, prompt=100, chain=500)


def test_cache_of_qwen3_vl_8b_by_hand() -> None:
    """36 layers x 8 heads x 128 values x 2 tensors x 2 bytes = 147,456 bytes a place."""
    text = SimpleNamespace(num_hidden_layers=36, num_key_value_heads=8, head_dim=128)
    assert cache_bytes(text, 1) == 147_456
    assert cache_bytes(text, 10_000) == 1_474_560_000


@pytest.mark.slow
def test_as_many_videos_run_together_as_their_caches_fit() -> None:
    """A video of 2B with 8 chains of thought: (1000 + 8 * 500) places of 114,688 bytes."""
    model = MetaRewardModel("nope_2b", dtype="bfloat16")
    weights = 2.0 * sizes_of(model.model).parameters
    of_video = 5000 * 28 * 8 * 128 * 2 * 2

    def videos(free: float, count: int = 100) -> int:
        share = share_of(free, model, LENGTHS, videos=count, copies=8)
        assert share.bytes == weights + share.videos * of_video
        return share.videos

    assert videos(weights + 3.5 * of_video) == 3
    # One runs, whatever is free: the plan then says what is missing.
    assert videos(weights / 2) == 1
    # vLLM runs 256 sequences, and no more than there are.
    assert videos(1e15) == 256 // 8
    assert videos(1e15, count=5) == 5


def _plan(*words: str) -> Plan:
    path = ROOT / "configs" / "wan" / "dual_rl.yaml"
    return plan_reward_model(load(DualRlRun, path, words), H100, LENGTHS)


@pytest.mark.long
def test_vllm_writes_the_same_flops_in_less_time_within_the_memory() -> None:
    """A built-in step reads the weights for each of 16 pairs, vLLM for all videos that fit."""
    builtin = _plan("dual_rl.engine=builtin")
    asleep = _plan("dual_rl.engine=vllm", "vllm.python=x")
    awake = _plan("dual_rl.engine=vllm", "vllm.python=x", "vllm.sleep=false")
    before, after = builtin.phases[0], asleep.phases[0]
    assert before.name == after.name == "chains of thought"
    assert after.flops == pytest.approx(before.flops, rel=0.01)
    assert after.seconds < before.seconds / 3
    assert asleep.peak < 79.6 * GIB
    # What does not sleep is in memory with everything else.
    assert awake.peak > asleep.peak
