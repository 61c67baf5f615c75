"""LocalEngine does what a DeepSpeed engine does for a single process."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from common.types import Engine
from engine import LocalEngine
from tests.launch.processes import run


class Number(nn.Module):
    """A single trained number w, at first 1, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)


def test_local_engine_is_an_engine() -> None:
    assert isinstance(LocalEngine(Number()), Engine)


def test_gradient_is_the_mean_over_backwards() -> None:
    """Losses 2w and 6w have gradients 2 and 6, so the step's is 4; Adam's first step is lr."""
    number = Number()
    engine = LocalEngine(number, accumulation=2, lr=0.25, max_grad_norm=None)
    engine.backward(2 * number.w)
    engine.step()
    assert (float(number.w.detach()), engine.grad_norm()) == (1.0, None)
    engine.backward(6 * number.w)
    engine.step()
    assert engine.grad_norm() == 4.0
    assert float(number.w.detach()) == pytest.approx(0.75, abs=1e-6)
    assert number.w.grad is None
    assert float(number.frozen.detach()) == 1.0


def test_norm_is_clipped_and_reported_unclipped() -> None:
    """Adam's first moment after a step is (1 - beta1) g: 0.1 times the clipped gradient."""
    number = Number()
    engine = LocalEngine(number, max_grad_norm=0.5)
    engine.backward(8 * number.w)
    engine.step()
    assert engine.grad_norm() == 8.0
    moment = engine.optimizer.state[number.w]["exp_avg"]
    assert float(moment) == pytest.approx(0.05, rel=1e-5)


def test_non_finite_gradient_changes_no_weight() -> None:
    number = Number()
    engine = LocalEngine(number, lr=0.5, weight_decay=0.1)
    engine.backward(math.inf * number.w)
    engine.step()
    assert (float(number.w.detach()), engine.skipped) == (1.0, 1)
    # the next step starts from an empty gradient
    engine.backward(2 * number.w)
    engine.step()
    assert engine.grad_norm() == 2.0
    assert float(number.w.detach()) < 1.0


def test_decay_is_that_of_adamw() -> None:
    """A zero gradient leaves decoupled decay alone: w (1 - lr decay)."""
    number = Number()
    engine = LocalEngine(number, lr=0.5, weight_decay=0.1)
    engine.backward(0 * number.w)
    engine.step()
    assert float(number.w.detach()) == pytest.approx(0.95, abs=1e-7)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        LocalEngine(Number().requires_grad_(requires_grad=False))
    with pytest.raises(ValueError, match="accumulation=0"):
        LocalEngine(Number(), accumulation=0)


@pytest.mark.slow
def test_local_engine_takes_the_steps_of_deepspeed() -> None:
    """Three steps of two backwards, clipped, with decay; the second is not finite."""
    done = run(sys.executable, "tests/engine/local_and_deepspeed.py")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("gap ")]
    _, gap, _, skipped = line.split()
    assert float(gap) < 1e-6
    assert skipped == "1"
