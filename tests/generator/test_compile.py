"""Compiled blocks give the same numbers while sampling and while training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from common.gaussian import log_prob
from tests.tiny import build_tiny_wan, tiny_config, tiny_generator

PROMPT = "a red circle"


@pytest.mark.long
@pytest.mark.parametrize("merge", [False, True])
def test_compiled_blocks_are_the_same_model(folder: Path, *, merge: bool) -> None:
    sampler = dataclasses.replace(tiny_config(folder).sampler, merge_adapter=merge)
    plain, compiled = (
        tiny_generator(folder, rollout_batch=1, sampler=sampler),
        tiny_generator(folder, rollout_batch=1, sampler=sampler, compile=True),
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


@pytest.mark.long
def test_compiled_blocks_serve_fast_and_exact_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured by dynamo and run by torch: every call has the bits of the plain blocks."""
    plain_compile = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(
        WanTransformer3DModel,
        "compile_repeated_blocks",
        lambda self: plain_compile(self, backend="eager"),
    )
    # what other tests have compiled does not count
    torch._dynamo.reset()
    folder = build_tiny_wan(tmp_path, layers=3)
    sampler = dataclasses.replace(
        tiny_config(folder).sampler,
        merge_adapter=True,
        attention="_native_flash",
        tail_attention="_native_math",
        tail_solver="ab2",
        tail_steps=3,
        tail_cache=2,
    )
    changes = {"sampler": sampler, "gradient_checkpointing": True}
    plain = tiny_generator(folder, **changes)
    compiled = tiny_generator(folder, compile=True, **changes)
    torch._dynamo.utils.counters.clear()

    (want,) = plain.rollout([PROMPT], group_size=2, seeds=[1])
    (got,) = compiled.rollout([PROMPT], group_size=2, seeds=[1])
    assert torch.equal(got.clean_GCFHW, want.clean_GCFHW)
    assert torch.equal(got.steps[0].log_prob_G, want.steps[0].log_prob_G)
    for generator in (plain, compiled):
        policy = generator.transition(PROMPT, want.steps[0])
        log_prob(policy, want.steps[0].next_GCFHW).sum().backward()
    for mine, theirs in zip(
        compiled.module.parameters(), plain.module.parameters(), strict=True
    ):
        if mine.requires_grad:
            assert torch.equal(mine.grad, theirs.grad)
    with torch.no_grad(), plain.reference(), compiled.reference():
        reference = plain.transition(PROMPT, want.steps[0]).mean
        assert torch.equal(compiled.transition(PROMPT, want.steps[0]).mean, reference)
    # every frame was captured: dynamo gives up a frame silently at its limit of graphs
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["total"] == frames["ok"]
    assert frames["total"] < torch._dynamo.config.recompile_limit
