"""The learning rate of a step: the shares by hand."""

from __future__ import annotations

import pytest

from engine.config import OptimizerConfig


@pytest.mark.parametrize(
    ("step", "share"),
    [(1, 0.25), (3, 0.75), (4, 1.0), (9, 0.55), (14, 0.1), (15, 0.1), (1000, 0.1)],
)
def test_rate_rises_then_falls_to_a_tenth(step: int, share: float) -> None:
    optimizer = OptimizerConfig(warmup_steps=4, decay_steps=14)
    assert optimizer.rate_share(step) == pytest.approx(share, rel=1e-12)


def test_rate_falls_from_the_first_step_without_a_warm_up() -> None:
    optimizer = OptimizerConfig(decay_steps=9)
    assert optimizer.rate_share(1) == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("step", [1, 2, 500])
def test_rate_is_constant_unless_asked(step: int) -> None:
    assert OptimizerConfig().rate_share(step) == 1.0


def test_rate_cannot_fall_before_it_has_risen() -> None:
    with pytest.raises(ValueError, match=r"decay_steps=3 .* warmup_steps=3"):
        OptimizerConfig(warmup_steps=3, decay_steps=3)
