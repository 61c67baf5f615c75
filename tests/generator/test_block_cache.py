from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from generator.block_cache import BlockCache
from generator.schedule import stochastic_steps
from generator.wan import WanGenerator
from tests.tiny import build_tiny_wan, tiny_config, tiny_generator

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan of five blocks."""
    return build_tiny_wan(tmp_path_factory.mktemp("deep"), layers=5)


def generator_of(folder: Path, **sampler: object) -> WanGenerator:
    return tiny_generator(
        folder, sampler=dataclasses.replace(tiny_config(folder).sampler, **sampler)
    )


class Calls:
    """Which blocks ran, by number."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.seen: list[int] = []
        self.hooks = [
            block.register_forward_hook(lambda *_, i=i: self.seen.append(i))
            for i, block in enumerate(blocks)
        ]

    def take(self) -> list[int]:
        seen, self.seen = self.seen, []
        return seen


def test_cached_call_follows_a_full_call(deep: Path) -> None:
    generator = generator_of(deep)
    transformer = generator.module.get_base_model()
    calls = Calls(transformer.blocks)
    cache = BlockCache(transformer)
    x = torch.randn(
        2, *generator.latent_shape, generator=torch.Generator().manual_seed(0)
    )

    def velocity(at: float) -> torch.Tensor:
        with torch.no_grad():
            return generator.velocity(
                x, torch.full((2,), at), [PROMPT] * 2, guidance_scale=3.0
            )

    plain = {at: velocity(at) for at in (0.8, 0.7)}
    assert calls.take() == [0, 1, 2, 3, 4] * 2
    with cache.call(again=False):
        assert torch.equal(velocity(0.8), plain[0.8])
    assert calls.take() == [0, 1, 2, 3, 4]
    with cache.call(again=True):
        same, near = velocity(0.8), velocity(0.7)
    assert calls.take() == [0, 4] * 2
    # at the same place what the middle adds is the same, up to the rounding of (h + r) - h
    assert float((same - plain[0.8]).abs().max()) < 1e-5
    assert float((near - plain[0.7]).abs().max()) > 1e-3  # elsewhere it is not
    assert (
        float((near - plain[0.8]).abs().max()) > 1e-3
    )  # but the first and the last block see where they are
    assert torch.equal(velocity(0.7), plain[0.7])  # outside, nothing is left of it
    assert [type(block).__name__ for block in transformer.blocks] == [
        "WanTransformerBlock"
    ] * 5


def test_cache_adds_the_middle_blocks_residual(deep: Path) -> None:
    """By hand on scalar blocks: the first doubles, the middle adds 5 and 7, the last negates."""

    class Block(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.function = function

        def forward(self, hidden: torch.Tensor, shift: float) -> torch.Tensor:
            return self.function(hidden, shift)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            functions = (
                lambda h, s: 2 * h,
                lambda h, s: h + 5 * s,
                lambda h, s: h + 7 * s,
                lambda h, s: -h,
            )
            self.blocks = nn.ModuleList(map(Block, functions))

        def forward(self, hidden: torch.Tensor, shift: float) -> torch.Tensor:
            for block in self.blocks:
                hidden = block(hidden, shift)
            return hidden

    model = Model()
    cache = BlockCache(model)
    one = torch.ones(1)
    with cache.call(again=True):  # nothing to use again yet: a full call
        assert float(model(one, 1.0)) == -(2 + 12)
    with cache.call(again=True):
        assert float(model(3 * one, 100.0)) == -(6 + 12)
    with pytest.raises(KeyError), cache.call(again=False):
        raise KeyError
    assert float(model(3 * one, 100.0)) == -(6 + 1200)


def test_cache_covers_tail_and_resets_per_rollout(deep: Path) -> None:
    plain, cached = generator_of(deep), generator_of(deep, tail_cache=2)
    calls = Calls(cached.module.get_base_model().blocks)
    (k,) = stochastic_steps(1, cached.cfg.sampler)
    (want,) = plain.rollout([PROMPT], group_size=2, seeds=[1])
    (got,) = cached.rollout([PROMPT], group_size=2, seeds=[1])
    tail = [[0, 1, 2, 3, 4] if i % 2 == 0 else [0, 4] for i in range(6 - 1 - k)]
    assert calls.take() == [
        i for call in [[0, 1, 2, 3, 4]] * (k + 1) + tail for i in call
    ]
    assert torch.equal(got.steps[0].next_GCFHW, want.steps[0].next_GCFHW)
    assert not torch.equal(got.clean_GCFHW, want.clean_GCFHW)
    (again,) = cached.rollout([PROMPT], group_size=2, seeds=[1])
    assert torch.equal(again.clean_GCFHW, got.clean_GCFHW)
    torch.testing.assert_close(
        cached.sample([PROMPT], [1]), plain.sample([PROMPT], [1]), rtol=0, atol=0
    )


def test_cache_with_two_blocks_raises(folder: Path) -> None:
    generator = generator_of(folder, tail_cache=2)
    with pytest.raises(ValueError, match="2"):
        generator.rollout([PROMPT], group_size=2, seeds=[1])
