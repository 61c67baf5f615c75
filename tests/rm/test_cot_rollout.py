"""The generation of chains of thought in stage 2."""

from __future__ import annotations

import pytest
import torch

import rm.dual_rl
from rm.config import Generation
from rm.cot_rollout import encode_pairs, generate_cots
from rm.generate import generate
from tests.rm.test_dual_rl import build, collect, pairs

__all__ = ["pairs"]  # a fixture
SAMPLED = Generation(max_new_tokens=12, temperature=2.0, repetition_penalty=1.0)


def test_generate_cots_does_not_depend_on_batch(pairs):
    model = build(pairs).model
    videos, encoded = encode_pairs(model, pairs)
    written = generate(
        model,
        model.batch(encoded, videos, query=False),
        SAMPLED,
        seeds=range(24),
        copies=3,
    )
    expected = [tuple(written.ids(row)) for row in range(24)]
    assert written.finished_B.any()
    assert not written.finished_B.all()
    assert len(set(expected)) > 12
    for batch in (1, 3, 8):
        groups = generate_cots(
            model, encoded, videos, SAMPLED, seeds=range(24), batch=batch
        )
        assert [len(group) for group in groups] == [3] * 8
        cots = [cot for group in groups for cot in group]
        assert [cot.ids for cot in cots] == expected
        assert [cot.finished for cot in cots] == written.finished_B.tolist()


def test_ratio_is_1_for_cots_from_another_distribution(pairs, monkeypatch):
    """CoTs sampled at another temperature: log-probabilities are still the trained model's."""

    def hot(model, encoded, videos, how, **options):
        return generate_cots(model, encoded, videos, SAMPLED, **options)

    monkeypatch.setattr(rm.dual_rl, "generate_cots", hot)
    loop = build(pairs, pairs_per_update=2, micro_batch=2)
    rollouts = collect(loop, [0, 1], step=0)
    with torch.no_grad():
        assert torch.equal(
            rollouts.old_BGT, loop.log_probs(loop.model, rollouts.packed)
        )
    assert loop.update([rollouts])["train/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
