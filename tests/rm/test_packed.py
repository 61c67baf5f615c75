"""Chains packed behind one prompt against each chain alone: log-probs, rewards and gradients."""

from __future__ import annotations

import pytest
import torch

from rm.config import Generation
from rm.generate import generate, rewards_from_cache
from rm.model import DeScore
from rm.packed import Packed, PackedCot, pack, packed_forward, token_log_probs
from rm.prompt import Encoded
from rm.video import prepare
from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, tiny_qwen, tiny_tokenizer

PROMPTS = ("a", "a red ball moves left")
CHAINS = [
    [
        PackedCot((65, 66, 67), finished=True),
        PackedCot((70,), finished=False),
        PackedCot((), finished=True),
    ],
    [
        PackedCot(tuple(range(40, 51)), finished=True),
        PackedCot((), finished=False),
        PackedCot((90, 91), finished=True),
    ],
]


@pytest.fixture(scope="module")
def model() -> DeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return (
            DeScore(
                tiny_qwen(layers=3), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264
            )
            .double()
            .eval()
        )


@pytest.fixture(scope="module")
def videos():
    return [
        prepare(random_frames(i, frames=4 + 2 * i), SETTINGS, fps=4.0) for i in range(2)
    ]


@pytest.fixture(scope="module")
def encoded(model, videos):
    return [
        model.encode(prompt, video)
        for prompt, video in zip(PROMPTS, videos, strict=True)
    ]


def packed(model, encoded, videos) -> Packed:
    return pack(model, encoded, videos, CHAINS)


def alone(model, encoded, video, chain):
    """Return log-probs and reward by a forward with the query and a forward without."""
    sequence = Encoded(encoded.prompt_ids, chain.ids)
    plain = model.batch([sequence], [video], query=False)
    logits = model.backbone.lm_head(model.hidden(plain)[0]).masked_fill(
        model.banned_ids(), -torch.inf
    )
    targets = [*chain.ids, *([model.end_id] if chain.finished else [])]
    start = len(encoded.prompt_ids)
    rows = logits[start - 1 : start - 1 + len(targets)].log_softmax(-1)
    return [rows[i, t] for i, t in enumerate(targets)], model(
        model.batch([sequence], [video])
    )[0]


def test_packed_cots_equal_separate_cots(model, encoded, videos) -> None:
    judged = packed_forward(model, packed(model, encoded, videos), temperature=1.0)
    for b in range(2):
        for g in range(3):
            log_probs, reward = alone(model, encoded[b], videos[b], CHAINS[b][g])
            expected = torch.zeros(12, dtype=torch.float64)
            if log_probs:
                expected[: len(log_probs)] = torch.stack(log_probs)
            torch.testing.assert_close(
                judged.log_prob_BGT[b, g].double(), expected, rtol=0, atol=2e-5
            )
            torch.testing.assert_close(
                judged.reward_BGK[b, g].double(), reward.double(), rtol=0, atol=1e-5
            )


def test_one_forward_gives_the_gradients_of_two(model, encoded, videos) -> None:
    weight_BG = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])
    named = {n: p for n, p in model.named_parameters() if ".visual." not in n}

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(named.items(), found, strict=True)
        }

    judged = packed_forward(model, packed(model, encoded, videos), temperature=1.0)
    one = gradients(
        (weight_BG * (judged.log_prob_BGT.sum(-1) + judged.reward_BGK[..., 0])).sum()
    )
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for g in range(3):
            log_probs, reward = alone(model, encoded[b], videos[b], CHAINS[b][g])
            loss = loss + weight_BG[b, g] * (sum(log_probs) + reward)
    many = gradients(loss)
    for name, gradient in many.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((one[name] - gradient).abs().max() / scale) < 2e-5, name
    assert many["query"].abs().max() > 0
    assert many["head.weight"].abs().max() > 0


def test_packed_cots_do_not_attend_to_each_other(model, encoded, videos) -> None:
    other = [[row[0], PackedCot((99, 98, 97), finished=True), row[2]] for row in CHAINS]
    first = packed_forward(model, packed(model, encoded, videos), temperature=1.0)
    second = packed_forward(model, pack(model, encoded, videos, other), temperature=1.0)
    torch.testing.assert_close(
        first.reward_BGK[:, [0, 2]], second.reward_BGK[:, [0, 2]], rtol=0, atol=1e-5
    )
    assert (first.reward_BGK[:, 1] - second.reward_BGK[:, 1]).abs().max() > 1e-3


def test_log_probs_are_the_samplers(model, encoded, videos) -> None:
    """Temperature and bans: over all ids that may come next, the probabilities add to one."""
    hidden = model.hidden(model.batch(encoded[:1], videos[:1], query=False))[0, -1:]
    allowed = (~model.banned_ids()).nonzero().squeeze(1)
    log_probs = token_log_probs(
        model, hidden.expand(len(allowed), -1), allowed, temperature=1.7
    )
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert token_log_probs(
        model, hidden, torch.tensor([model.query_id]), temperature=1.0
    ).item() == -float("inf")


def test_logits_in_parts_change_nothing(model, monkeypatch) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.arange(7)
    whole = token_log_probs(model, hidden, target, temperature=1.0)
    (expected,) = torch.autograd.grad(whole.sum(), hidden)
    monkeypatch.setattr("rm.packed._TOKENS_PER_PART", 3)
    parts = token_log_probs(model, hidden, target, temperature=1.0)
    (found,) = torch.autograd.grad(parts.sum(), hidden)
    assert torch.equal(parts, whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_sharded_model_makes_as_many_parts_as_the_rank_with_most_tokens(
    model, monkeypatch
) -> None:
    """Empty parts change neither values nor gradients."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=draw, dtype=torch.float64, requires_grad=True)
    whole = token_log_probs(model, hidden, torch.arange(7), temperature=1.0)
    (expected,) = torch.autograd.grad(whole.sum(), hidden)
    asked, calls = [], []
    hook = model.backbone.lm_head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("rm.packed._TOKENS_PER_PART", 3)
    monkeypatch.setattr(
        "rm.packed.max_over_ranks", lambda count: asked.append(count) or 5.0
    )
    monkeypatch.setattr(model, "sharded", True, raising=False)
    parts = token_log_probs(model, hidden, torch.arange(7), temperature=1.0)
    (found,) = torch.autograd.grad(parts.sum(), hidden)
    hook.remove()
    assert (asked, len(calls)) == ([3], 10)  # five forwards, five again in the backward
    assert torch.equal(parts, whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_copies_equal_single_calls_with_the_same_seeds(model, encoded, videos) -> None:
    """G chains of each video from one prefill equal G single calls with the same seeds."""
    how = Generation(max_new_tokens=6, temperature=2.0, repetition_penalty=1.0)
    calls = []
    hook = model.backbone.model.visual.register_forward_hook(lambda *_: calls.append(1))
    together = generate(
        model, model.batch(encoded, videos, query=False), how, seeds=range(6), copies=3
    )
    assert len(calls) == 1
    hook.remove()
    rewards = rewards_from_cache(model, together)
    for b in range(2):
        for g in range(3):
            single = generate(
                model,
                model.batch([encoded[b]], [videos[b]], query=False),
                how,
                seeds=[3 * b + g],
            )
            assert together.ids(3 * b + g) == single.ids(0)
            assert rewards[3 * b + g].item() == pytest.approx(
                rewards_from_cache(model, single)[0].item(), abs=1e-5
            )
