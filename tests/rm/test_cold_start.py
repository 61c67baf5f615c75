"""Stage 1 learns on a random Qwen3-VL and depends only on its data, settings and seed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

import rm.cold_start
from rm.cold_start import ColdStart
from rm.config import BackboneLora, ColdStartConfig, Generation, LearningRates, Masking
from rm.data import Pair, PairSchedule
from rm.model import DeScore
from tests.launch.processes import refused_early
from tests.tiny_qwen import SETTINGS, TEMPLATE, tiny_qwen, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RATES = LearningRates(llm=1e-3, vision=1e-3, merger=1e-3, query=1e-3, head=1e-2)
LABELS = (1, -1, 1, -1)


class PlainEngine:
    """An engine as deepspeed's: the MEAN over ``accumulation`` backwards, then a step."""

    def __init__(self, groups: list[dict], accumulation: int) -> None:
        self.optimizer = torch.optim.AdamW(groups)
        self.accumulation, self.calls = accumulation, 0
        self.gradients: list[list[torch.Tensor]] = []  # of each optimizer step

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.accumulation == 0:
            parameters = [
                p for group in self.optimizer.param_groups for p in group["params"]
            ]
            self.gradients.append(
                [
                    torch.zeros(()) if p.grad is None else p.grad.clone()
                    for p in parameters
                ]
            )
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def pairs(cold_start_pairs) -> list[Pair]:
    return cold_start_pairs


def build(pairs, *, lora=None, **changes) -> ColdStart:
    options = {
        "pairs_per_step": 4,
        "micro_batch": 4,
        "mask_probability": 0.5,
        **changes,
    }
    cfg = ColdStartConfig(
        masking=Masking(probability=options.pop("mask_probability")), **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264)
        groups = model.param_groups(RATES, lora=lora, weight_decay=0.0)
    engine = PlainEngine(groups, cfg.pairs_per_step // cfg.micro_batch)
    schedule = PairSchedule(len(pairs), pairs_per_step=cfg.pairs_per_step, seed=0)
    return ColdStart(
        cfg, model=model, engine=engine, pairs=pairs, schedule=schedule, seed=0
    )


@torch.no_grad()
def margins(loop: ColdStart, pairs, *, masked: bool) -> torch.Tensor:
    loop.model.eval()
    reward_N2K = loop.rewards(
        pairs, [("", "") if masked else (pair.cot_A, pair.cot_B) for pair in pairs]
    )
    reward_N2 = reward_N2K.squeeze(-1)
    return (reward_N2[:, 0] - reward_N2[:, 1]) * torch.tensor(
        [pair.label for pair in pairs]
    )


@pytest.mark.parametrize("lora", [None, BackboneLora(rank=4, alpha=8.0, dropout=0.0)])
def test_two_steps_lower_the_loss_of_four_pairs(pairs, lora):
    loop = build(pairs, lora=lora)
    before = [
        -logsigmoid(margins(loop, pairs, masked=masked)).mean().item()
        for masked in (True, False)
    ]
    metrics = [loop.step(step) for step in range(2)]
    after = [
        -logsigmoid(margins(loop, pairs, masked=masked)).mean().item()
        for masked in (True, False)
    ]
    assert after[0] < before[0]
    assert after[1] < before[1]
    assert metrics[0]["train/loss"] == pytest.approx(
        math.log(2), abs=0.2
    )  # a new head knows nothing
    for step in range(2, 12):
        last = loop.step(step)
    assert last["train/accuracy"] == 1.0
    assert last["train/loss"] < 0.3


def test_the_loss_and_metrics_by_hand(pairs):
    loop = build(pairs, mask_probability=0.0)
    signed = margins(loop, pairs, masked=False)
    found = loop.step(0)
    assert found["train/loss"] == pytest.approx(
        -logsigmoid(signed).mean().item(), abs=1e-6
    )
    assert found["train/margin"] == pytest.approx(signed.mean().item(), abs=1e-6)
    assert found["train/accuracy"] == (signed > 0).float().mean().item()
    assert found["train/masked"] == 0.0


def test_masked_cot_equals_absent_cot(pairs):
    bare = [replace(pair, cot_A="", cot_B="") for pair in pairs]
    masked, never = (
        build(pairs, mask_probability=1.0),
        build(bare, mask_probability=0.0),
    )
    kept = build(pairs, mask_probability=0.0)
    loss = masked.step(0)["train/loss"]
    assert loss == pytest.approx(never.step(0)["train/loss"], abs=1e-7)
    assert loss != pytest.approx(kept.step(0)["train/loss"], abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_are_one_step(pairs, micro_batch):
    whole, parts = build(pairs), build(pairs, micro_batch=micro_batch)
    assert whole.step(0)["train/loss"] == pytest.approx(
        parts.step(0)["train/loss"], abs=1e-6
    )
    assert parts.engine.calls == 4 // micro_batch
    for a, b in zip(whole.engine.gradients[0], parts.engine.gradients[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_tie_in_batch_does_not_change_loss_mean(pairs):
    tie = Pair(pairs[0].prompt, pairs[0].video_A, pairs[0].video_B, "x", "y", 0)
    mixed = build([*pairs, tie], pairs_per_step=5, micro_batch=1, mask_probability=0.0)
    plain = build(pairs, mask_probability=0.0)
    assert mixed.step(0)["train/loss"] == pytest.approx(
        plain.step(0)["train/loss"], abs=1e-6
    )
    for a, b in zip(mixed.engine.gradients[0], plain.engine.gradients[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_with_theta_a_tie_counts(pairs):
    tie = Pair(pairs[0].prompt, pairs[0].video_A, pairs[0].video_B, "x", "y", 0)
    loop = build(
        [*pairs, tie], pairs_per_step=5, micro_batch=1, mask_probability=0.0, theta=5.0
    )
    signed = margins(loop, pairs, masked=False)
    with torch.no_grad():
        d = loop.rewards([tie], [(tie.cot_A, tie.cot_B)])[0, :, 0].diff()
    shift = math.log(5.0)
    tied = -logsigmoid(d - shift) - logsigmoid(-d - shift) - math.log(24.0)
    want = (-logsigmoid(signed - shift).sum() + tied) / 5
    assert loop.step(0)["train/loss"] == pytest.approx(want.item(), abs=1e-5)


def test_margin_is_subtracted_from_the_difference(pairs):
    loop = build(pairs, mask_probability=0.0, margin=0.57)
    signed = margins(loop, pairs, masked=False)
    assert loop.step(0)["train/loss"] == pytest.approx(
        -logsigmoid(signed - 0.57).mean().item(), abs=1e-6
    )


def test_part_of_a_cot_may_be_masked(pairs):
    """A step on masked sentences is the step on pairs that only ever had the other sentences."""
    long = [
        replace(p, cot_A="One. Two. Three.", cot_B="Four. Five. Six. Seven.")
        for p in pairs
    ]
    loop = build(long)
    loop.cfg = replace(loop.cfg, masking=Masking(0.5, "video", "sentence"))
    left = {draw.row: loop.masked(draw) for draw in loop.schedule.at(0)}
    other = build(
        [replace(p, cot_A=left[i][0], cot_B=left[i][1]) for i, p in enumerate(long)],
        mask_probability=0.0,
    )
    found = loop.step(0)
    assert found["train/loss"] == pytest.approx(other.step(0)["train/loss"], abs=1e-7)
    share = sum(1 - len(left[i][0]) / 16 + 1 - len(left[i][1]) / 23 for i in range(4))
    assert found["train/masked"] == pytest.approx(share / 8)
    assert 0 < share / 8 < 1


def test_swapping_a_pair_and_its_label_changes_nothing(pairs):
    swapped = [
        Pair(p.prompt, p.video_B, p.video_A, p.cot_B, p.cot_A, -p.label) for p in pairs
    ]
    one, other = build(pairs), build(swapped)
    assert one.step(0)["train/loss"] == pytest.approx(
        other.step(0)["train/loss"], abs=1e-6
    )


def test_resumed_training_equals_uninterrupted(pairs):
    lora = BackboneLora(
        rank=4, alpha=8.0, dropout=0.3
    )  # dropout must be the same draws
    through = build(pairs, lora=lora, micro_batch=2)
    unbroken = [through.step(step)["train/loss"] for step in range(4)]
    first = build(pairs, lora=lora, micro_batch=2)
    for step in range(2):
        first.step(step)
    second = build(pairs, lora=lora, micro_batch=2)
    second.model.load_state_dict(first.model.state_dict())
    second.engine.optimizer.load_state_dict(first.engine.optimizer.state_dict())
    torch.manual_seed(99)
    assert [second.step(step)["train/loss"] for step in (2, 3)] == unbroken[2:]
    for a, b in zip(through.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_has_no_masking_and_no_dropout(pairs):
    loop = build(
        pairs,
        mask_probability=1.0,
        lora=BackboneLora(rank=4, alpha=8.0, dropout=0.9),
        micro_batch=2,
    )
    loop.step(0)
    found = loop.evaluate(pairs[:3])  # the last micro-batch is not full
    assert not loop.model.training
    signed = margins(loop, pairs[:3], masked=False)
    assert found["heldout/accuracy"] == pytest.approx(
        (signed > 0).float().mean().item()
    )
    assert found == loop.evaluate(pairs[:3])
    assert found["heldout/accuracy_with_ties"] >= found["heldout/accuracy"]


@pytest.mark.parametrize(
    ("cache_gb", "decoded"), [(1.0, 8), (0.0, 24), (200_000 / 2**30, 22)]
)
def test_video_cache_keeps_videos_within_its_size(
    pairs, monkeypatch, cache_gb, decoded
):
    # A video is 4 x 4 x 4 patches of 3 * 2 * 8 * 8 floats, 98 kB, and some 150 ids:
    # one of the 8 fits into 200 kB.
    calls = []
    real = rm.cold_start.prepare
    monkeypatch.setattr(
        rm.cold_start, "prepare", lambda *a: calls.append(a[0]) or real(*a)
    )
    loop = build(pairs, cache_gb=cache_gb)
    for _ in range(3):
        margins(loop, pairs, masked=False)
    assert len(calls) == decoded


def test_non_finite_cold_start_loss_is_reported(pairs, capsys):
    loop = build(pairs)
    with torch.no_grad():
        loop.model.head.weight.fill_(math.inf)
    assert not math.isfinite(loop.step(3)["train/loss"])
    assert "step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        (Masking, {"probability": 1.5}),
        (Masking, {"per": "frame"}),
        (Masking, {"unit": "word"}),
        (ColdStartConfig, {"margin": -1.0}),
        (ColdStartConfig, {"margin": 1.0, "theta": 5.0}),
        (ColdStartConfig, {"theta": 1.0}),
        (ColdStartConfig, {"pairs_per_step": 0}),
        (ColdStartConfig, {"epochs": 0}),
        (ColdStartConfig, {"cache_gb": -1}),
        (BackboneLora, {"rank": 0}),
        (BackboneLora, {"dropout": 1.0}),
        (LearningRates, {"head": -1e-6}),
        (Generation, {"max_new_tokens": 0}),
        (Generation, {"temperature": -1.0}),
        (Generation, {"repetition_penalty": 0.0}),
    ],
)
def test_wrong_cold_start_value_names_the_key(schema, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        schema(**wrong)


def test_defaults_are_the_papers():
    cfg, lora, rates = ColdStartConfig(), BackboneLora(), LearningRates()
    assert (cfg.pairs_per_step, cfg.epochs, cfg.masking, cfg.theta) == (
        32,
        2.0,
        Masking(0.5, "pair", "cot"),
        None,
    )
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 128.0, 0.05)
    assert {rates.llm, rates.vision, rates.merger, rates.query, rates.head} == {2e-6}


def test_cold_start_typo_exits_2():
    said = refused_early(
        "launch/cold_start.py",
        "--config",
        "configs/shapes/cold_start.yaml",
        "cold_start.epoch=3",
    )
    assert "'cold_start.epochs'" in said
