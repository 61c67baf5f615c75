"""What a rehearsal does not run and counts all the same, and the stand-ins that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from common import memory, strict_loading
from common.config import load
from launch.planning.roofline import Rates
from launch.rehearsal.cots import ShortCots
from launch.rehearsal.device import SimulatedGpu
from launch.rehearsal.ledger import Costs, Ledger
from launch.rehearsal.model_folders import shapes_only
from launch.rehearsal.patches import as_on_cuda
from launch.rehearsal.repeats import SEEN
from launch.rehearsal.stand_ins import adapt
from launch.schemas.pairs import DpoRun
from launch.schemas.training import DualRlRun, GrpoRun
from rm.config import Generation
from rm.scorer import DeScoreScorer

ROOT = Path(__file__).parents[3]
WAN = ROOT / "assets" / "shapes" / "wan"
GPU = torch.device("meta")
# Every byte counts, so that costs grow with the length of a cache.
RATES = Rates(**{field.name: 1e9 for field in fields(Rates)})
RATES = type(RATES)(**{**RATES.__dict__, "launch": 1e-9, "host": 1e-9})


@contextmanager
def device(gpu: SimulatedGpu) -> Iterator[None]:
    """The simulated device without ranks, and modules without weights."""
    with ExitStack() as stack:
        build = shapes_only(gpu)
        patch = mock.patch.object(strict_loading, "_read_weights", build)
        for context in (patch, memory.device_is(GPU), as_on_cuda(gpu), gpu):
            stack.enter_context(context)
        yield


# ------------------------------------------------------------------ calls that repeat


def transformer(gpu: SimulatedGpu) -> Any:
    from diffusers import WanTransformer3DModel

    return strict_loading.load_pretrained(
        WanTransformer3DModel, WAN / "transformer", device=GPU, dtype=torch.bfloat16
    )


@torch.no_grad()
def call(model: Any, batch: int) -> torch.Tensor:
    return model(
        hidden_states=torch.ones(batch, 16, 3, 4, 4, device=GPU).bfloat16(),
        timestep=torch.ones(batch, device=GPU),
        encoder_hidden_states=torch.ones(batch, 8, 64, device=GPU).bfloat16(),
        return_dict=False,
    )[0]


def counted(calls: int, *, seen: int) -> tuple[Costs, int, int]:
    """Costs of several calls, their peak, and how many of them really ran."""
    gpu = SimulatedGpu(RATES)
    with device(gpu), mock.patch("launch.rehearsal.repeats.SEEN", seen):
        model = transformer(gpu)
        ran = mock.Mock(return_value=None)
        model.blocks[0].register_forward_hook(lambda *_: ran())
        gpu.ledger.enter("calls")
        for _ in range(calls):
            assert call(model, 2).shape == (2, 16, 3, 4, 4)
        costs = gpu.ledger.phases["calls"]
        return costs, costs.peak, ran.call_count


@pytest.mark.slow
def test_calls_that_repeat_count_as_if_they_were_run():
    repeated, peak, ran = counted(6, seen=SEEN)
    every, real_peak, real_ran = counted(6, seen=99)
    assert (ran, real_ran) == (2, 6)
    assert repeated.kernels == every.kernels
    assert repeated.device_seconds == pytest.approx(every.device_seconds)
    assert peak == real_peak


def test_a_call_of_other_shapes_or_of_another_state_is_run():
    gpu = SimulatedGpu(RATES)
    with device(gpu):
        model = transformer(gpu)
        ran = mock.Mock(return_value=None)
        model.blocks[0].register_forward_hook(lambda *_: ran())
        for batch in (1, 1, 1, 2):
            call(model, batch)
        assert ran.call_count == 3
        model.blocks[0].attn1.processor._attention_backend = "sage"
        call(model, 1)
        assert ran.call_count == 4


# ------------------------------------------------------------------ chains of thought


def scored(descore: Path, *, length: int, written: int, limit: int = 64) -> Costs:
    """Costs of scoring three videos with chains of a length, of which some tokens are written."""
    gpu = SimulatedGpu(RATES)
    cots = ShortCots(gpu, length=length, written=written)
    with device(gpu), cots.used():
        scorer = DeScoreScorer.load(descore)
        scorer.model.generation = Generation(max_new_tokens=limit)
        videos = torch.zeros(3, 5, 32, 32, 3, dtype=torch.uint8)
        gpu.ledger.enter("score")
        score = scorer.score(videos, ["a", "b", "c"], fps=8.0)
    assert score.value_B.isfinite().all()
    return gpu.ledger.phases["score"]


@pytest.mark.slow
def test_tokens_that_are_not_written_cost_what_written_ones_do(descore, monkeypatch):
    monkeypatch.setattr("launch.rehearsal.cots.LONGEST", 1.0)
    # The loop looks for the end at every 16th token.
    short = scored(descore, length=31, written=15)
    whole = scored(descore, length=31, written=31)
    for name in ("argmax", "gemm_bf16", "silu"):
        assert short.kernels[name] == pytest.approx(whole.kernels[name], rel=0.01), name
    assert short.device_seconds == pytest.approx(whole.device_seconds, rel=0.01)
    assert short.peak == pytest.approx(whole.peak, rel=0.02)


@pytest.mark.slow
def test_a_batch_writes_until_its_longest_chain_ends(descore):
    def tokens(length: int, limit: int) -> float:
        costs = scored(descore, length=length, written=15, limit=limit)
        return costs.kernels["argmax"]

    # Three rows: 1.5 times 32 steps, and the one that ends.
    assert tokens(32, 64) == pytest.approx(48 + 1)
    # The checkpoint allows 40 tokens.
    assert tokens(32, 40) == pytest.approx(40 + 1)


# ------------------------------------------------------------------ the ledger


def test_a_recorded_call_counts_inside_and_outside():
    ledger = Ledger()
    ledger.now.kernels["mm"] += 1
    with ledger.record() as costs:
        ledger.now.kernels["mm"] += 2
        ledger.allocated(100)
        ledger.freed(100)
    ledger.repeat(costs, above=300)
    assert costs.kernels == {"mm": 2}
    assert ledger.now.kernels == {"mm": 5}
    assert ledger.now.peak == 300
    assert ledger.live == 0


# ------------------------------------------------------------------ stand-ins


def adapted(schema: type, name: str, folder: Path, ranks: int, *overrides: str) -> Any:
    cfg = load(schema, ROOT / "configs" / "wan" / f"{name}.yaml", overrides)
    return adapt(cfg, folder, ranks)


@pytest.mark.slow
def test_grpo_keeps_the_batch_of_a_rank_up_to_eight_groups(tmp_path):
    on_8 = adapted(GrpoRun, "grpo", tmp_path / "8", 8)
    assert (on_8.cfg.prompts_per_step, on_8.repeats) == (64, 1)
    on_1 = adapted(GrpoRun, "grpo", tmp_path / "1", 1)
    assert (on_1.cfg.prompts_per_step, on_1.repeats) == (8, 8)
    assert on_1.cfg.generator.sampler.num_steps == 16


@pytest.mark.slow
def test_the_stand_in_of_a_published_wan_has_its_parameters(tmp_path):
    from diffusers import WanTransformer3DModel

    cfg = adapted(GrpoRun, "grpo", tmp_path, 8).cfg
    gpu = SimulatedGpu(RATES)
    with device(gpu):
        model = strict_loading.load_pretrained(
            WanTransformer3DModel,
            Path(cfg.generator.path) / "transformer",
            dtype=torch.bfloat16,
        )
    # As published; bf16, but for what diffusers keeps in fp32.
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert 2 * 1_418_996_800 < gpu.ledger.live < 2.2 * 1_418_996_800


def test_dual_rl_runs_two_of_its_sixteen_updates(tmp_path):
    made = adapted(DualRlRun, "dual_rl", tmp_path, 8)
    assert made.cfg.dual_rl.pairs_per_step == 16
    assert made.repeats == 8


@pytest.mark.slow
def test_ranks_that_do_not_divide_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs_per_step=64"):
        adapted(DpoRun, "dpo", tmp_path, 3)
    with pytest.raises(ValueError, match="no-such-wan"):
        adapted(DpoRun, "dpo", tmp_path, 8, "generator.path=no-such-wan")
