"""The generation of chains of thought in stage 2."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rm.dual_rl
from rm.generate import generate
from tests.rm.test_dual_rl import build, collect, pairs

__all__ = ["pairs"]  # a fixture


def test_sampled_cots_do_not_depend_on_the_micro_batch(pairs):
    loop = build(pairs)
    together = loop.sample([0, 1, 2, 3], 0).cots
    assert len(together) == 8
    assert len({cot.ids for group in together for cot in group}) > 12
    alone = [group for row in range(4) for group in loop.sample([row], 0).cots]
    assert alone == together


def test_ratio_is_1_for_cots_from_another_distribution(pairs, monkeypatch):
    """CoTs sampled at another temperature: log-probabilities are still the trained model's."""

    def hot(model, batch, how, **options):
        return generate(model, batch, replace(how, temperature=2.0), **options)

    monkeypatch.setattr(rm.dual_rl, "generate", hot)
    loop = build(pairs, pairs_per_update=2, micro_batch=2)
    rollouts = collect(loop, [0, 1], step=0)
    with torch.no_grad():
        assert torch.equal(
            rollouts.old_BGT, loop.log_probs(loop.model, rollouts.packed)
        )
    assert loop.update([rollouts])["train/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
