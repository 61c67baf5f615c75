"""Compiled blocks give the same numbers while sampling and while training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.gaussian import log_prob
from tests.tiny import tiny_generator

PROMPT = "a red circle"


@pytest.mark.long
def test_compiled_blocks_are_the_same_model(folder: Path) -> None:
    plain, compiled = (
        tiny_generator(folder, rollout_batch=1),
        tiny_generator(folder, rollout_batch=1, compile=True),
    )
    (want,) = plain.rollout([PROMPT], group_size=2, seeds=[1])
    (got,) = compiled.rollout([PROMPT], group_size=2, seeds=[1])
    torch.testing.assert_close(got.clean_GCFHW, want.clean_GCFHW, rtol=1e-3, atol=1e-4)
    step = got.steps[0]
    law = compiled.transition(PROMPT, step)
    assert (
        float((log_prob(law, step.next_GCFHW).detach() - step.log_prob_G).abs().max())
        < 1e-5
    )
    other = plain.transition(PROMPT, step)
    for one in (law, other):
        (
            one.mean * torch.linspace(-1, 1, one.mean.numel()).view(one.mean.shape)
        ).sum().backward()
    for (name, mine), theirs in zip(
        compiled.module.named_parameters(), plain.module.parameters(), strict=True
    ):
        if mine.requires_grad:
            assert (
                float((mine.grad - theirs.grad).norm())
                < 1e-3 * float(theirs.grad.norm()) + 1e-6
            ), name
    with torch.no_grad(), compiled.reference():
        reference = compiled.transition(PROMPT, step)
    with torch.no_grad(), plain.reference():
        torch.testing.assert_close(
            reference.mean, plain.transition(PROMPT, step).mean, rtol=1e-3, atol=1e-4
        )
    assert "_orig_mod" not in " ".join(
        compiled.module.state_dict()
    )  # checkpoints keep their names
