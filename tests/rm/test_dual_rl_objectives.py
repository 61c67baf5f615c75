"""Stage 2 where nothing is 1 or 0: moved adapters, clipped ratios, ties, a temperature."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import rm.cot_backend
import rm.dual_rl
from rm.cot_rollout import Rollouts
from rm.data import Pair
from rm.dual_rl import DualRl
from rm.packed import packed_forward
from rm.prompt import Encoded
from rm.video import prepare
from tests.rm.test_dual_rl import G, build, chains_of, collect
from tests.tiny_qwen import SETTINGS

TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def pairs(dual_rl_pairs) -> list[Pair]:
    return dual_rl_pairs


def move_adapters(loop: DualRl) -> None:
    """Give the adapters an effect, as after many steps."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in loop.model.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise)


def tokens_of(rollouts: Rollouts) -> torch.Tensor:
    return rollouts.packed.token_BGT.flatten(0, 1)


def losses_of(loop: DualRl, rollouts: Rollouts) -> dict[str, float]:
    count_K = [float(rollouts.label_NK.shape[0] * G)]
    _, sums = loop.loss(rollouts, float(rollouts.tokens), count_K)
    return sums


def test_kl_to_the_reference_is_k3_of_the_policy(pairs) -> None:
    loop = build(pairs)
    move_adapters(loop)
    rollouts = collect(loop, [0, 1], step=0)
    output = packed_forward(loop.model, rollouts.packed, temperature=1.0)
    policy = output.log_prob_BGT.flatten(0, 1)[tokens_of(rollouts)].tolist()
    reference = rollouts.reference_BGT.flatten(0, 1)[tokens_of(rollouts)].tolist()
    # log(reference / policy), and exp of it: the swapped order gives another number
    differences = [r - p for p, r in zip(policy, reference, strict=True)]
    want = sum(math.exp(d) - 1 - d for d in differences) / len(differences)
    swapped = sum(math.exp(-d) - 1 + d for d in differences) / len(differences)
    got = losses_of(loop, rollouts)["kl"]
    assert got == pytest.approx(want, rel=1e-4)
    assert got > 1e-4
    assert abs(want - swapped) > 10 * abs(got - want)


def test_kl_is_added_to_the_loss_and_pulls_towards_the_reference(pairs) -> None:
    loop = build(pairs)
    move_adapters(loop)
    rollouts = collect(loop, [0, 1], step=0)
    sums = losses_of(loop, rollouts)
    total = sums["policy"] + 0.1 * sums["kl"] + 0.5 * sums["bt"]
    assert sums["loss"] == pytest.approx(total, rel=1e-5)
    # with the KL alone, a step against the gradient lowers it
    alone = build(pairs, kl_weight=1.0, bt_weight=0.0)
    move_adapters(alone)
    silent = replace(rollouts, advantage_VG=torch.zeros_like(rollouts.advantage_VG))
    parameters = [
        parameter
        for name, parameter in alone.model.named_parameters()
        if "lora_" in name and parameter.requires_grad
    ]
    loss, _ = alone.loss(silent, float(silent.tokens), [8.0])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(0.1 * gradient)
    assert losses_of(alone, silent)["kl"] < 0.999 * losses_of(loop, rollouts)["kl"]


def test_ratios_beyond_every_clip_by_hand(pairs) -> None:
    """Clips 0.2 and 0.3 and the dual clip 3, with advantages of both signs."""
    loop = build(pairs)
    rollouts = collect(loop, [0, 1], step=0)
    current = packed_forward(loop.model, rollouts.packed, temperature=1.0).log_prob_BGT
    # ratios 0.5, 0.9, 1.1, 1.6, 5 in turn
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.6, 5.0])
    shape = current.shape
    ratio_BGT = ratios[torch.arange(current.numel()) % 5].view(shape)
    signs = torch.tensor([1.0, -1.0, 2.0, -0.5]).repeat(4).view(4, G)
    changed = replace(
        rollouts,
        old_BGT=current.detach() - ratio_BGT.log(),
        advantage_VG=signs,
    )
    total = 0.0
    outside = 0
    mask = tokens_of(changed)
    for row, masks, advantage in zip(
        ratio_BGT.flatten(0, 1).tolist(),
        mask.tolist(),
        signs.flatten().tolist(),
        strict=True,
    ):
        for ratio, counts in zip(row, masks, strict=True):
            if not counts:
                continue
            clipped = min(max(ratio, 1 - 0.2), 1 + 0.3)
            term = min(ratio * advantage, clipped * advantage)
            if advantage < 0:
                term = max(term, 3.0 * advantage)
            total += term
            outside += ratio == 5.0 and advantage < 0
    assert outside > 0
    got = losses_of(loop, changed)["policy"]
    assert got == pytest.approx(-total / int(mask.sum()), rel=1e-4)


def test_ties_of_stage_2_follow_rao_and_kupper(pairs) -> None:
    tied = [pairs[0], replace(pairs[1], label=0)]
    loop = build(tied, theta=2.0, pairs_per_step=2, pairs_per_update=2, micro_batch=2)
    rollouts = collect(loop, [0, 1], step=0)
    output = packed_forward(loop.model, rollouts.packed, temperature=1.0)
    reward_2G = output.reward_BGK[..., 0].double()
    margin_G = reward_2G[0::2] - reward_2G[1::2]

    def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
        return -torch.log1p(torch.exp(-x))

    shift = math.log(2.0)
    decided = -log_sigmoid(margin_G[0] - shift)
    tie = (
        -log_sigmoid(margin_G[1] - shift)
        - log_sigmoid(-margin_G[1] - shift)
        - math.log(3.0)
    )
    want = (decided.sum() + tie.sum()).item() / (2 * G)
    assert loop.update([rollouts])["train/bt"] == pytest.approx(want, rel=1e-5)


def test_temperature_is_the_samplers(pairs, monkeypatch) -> None:
    # nearly greedy: the G CoTs of a video are equal, which they are not at 1
    cold = build(pairs, temperature=1e-4)
    for pair in chains_of(collect(cold, [0], step=0)):
        for group in pair:
            assert all(cot == group[0] for cot in group)
    warm = chains_of(collect(build(pairs), [0], step=0))
    assert any(cot != group[0] for pair in warm for group in pair for cot in group)


def test_log_probs_divide_the_logits_by_the_temperature(pairs) -> None:
    loop = build(pairs, temperature=TEMPERATURE)
    rollouts = collect(loop, [2], step=0)
    model = loop.model
    log_prob = loop.log_probs(model, rollouts.packed).flatten(0, 1)
    ((side_A, _),) = chains_of(rollouts)
    video = prepare(pairs[2].video_A, SETTINGS)
    prompt = model.encode(pairs[2].prompt, video).prompt_ids
    for i, cot in enumerate(side_A):
        # a plain forward over the sequence, and softmax in float64
        ids = tuple(token for token in cot if token != model.end_id)
        batch = model.batch([Encoded(prompt, ids)], [video], query=False)
        logits = model.backbone.lm_head(model.hidden(batch)[0]).double()
        logits = logits.masked_fill(model.banned_ids(), -math.inf) / TEMPERATURE
        rows = logits[len(prompt) - 1 :].log_softmax(-1)
        want = [rows[n, token].item() for n, token in enumerate(cot)]
        got = log_prob[i][tokens_of(rollouts)[i]].tolist()
        assert got == pytest.approx(want, abs=2e-4)


def test_first_ratio_and_kl_are_neutral_at_any_temperature(pairs) -> None:
    loop = build(
        pairs,
        temperature=TEMPERATURE,
        pairs_per_update=2,
        micro_batch=2,
        pairs_per_step=4,
    )
    rollouts = collect(loop, [0, 1], step=0)
    assert rollouts.old_BGT is not None
    metrics = loop.update([rollouts])
    assert metrics["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/kl"] == pytest.approx(0.0, abs=1e-8)


def test_every_rollout_has_its_seed(pairs, monkeypatch) -> None:
    loop = build(pairs)
    seen: list[int] = []
    original = rm.cot_backend.generate

    def note(*args, seeds, **options):
        seen.extend(seeds)
        return original(*args, seeds=seeds, **options)

    monkeypatch.setattr(rm.cot_backend, "generate", note)
    for step in range(2):
        loop.sample([0, 3], step)
    # 2 steps, 2 pairs, 2 sides, G rollouts
    assert len(seen) == len(set(seen)) == 2 * 2 * 2 * G


def test_heldout_accuracy_counts_margins_of_the_labels_sign(pairs, monkeypatch) -> None:
    """Labels 1, -1, 1, -1; A has the higher reward in pairs 0, 2 and 3: three are right."""
    assert [pair.label for pair in pairs] == [1, -1, 1, -1]
    reward_B1 = torch.tensor([3.0, 1.0, 0.0, 0.5, 2.0, -1.0, 4.0, 0.0]).unsqueeze(1)
    original = rm.dual_rl.generate

    def finished(*args, **options):
        written = original(*args, **options)
        return replace(written, finished_B=torch.ones_like(written.finished_B))

    monkeypatch.setattr(rm.dual_rl, "generate", finished)
    monkeypatch.setattr(rm.dual_rl, "rewards_from_cache", lambda *_: reward_B1)
    loop = build(pairs)
    # The rewards are given, so the CoTs may be short.
    loop.model.generation = replace(loop.model.generation, max_new_tokens=4)
    metrics = loop.evaluate(pairs)
    assert metrics["heldout/accuracy"] == pytest.approx(3 / 4)
