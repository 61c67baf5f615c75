"""Clipping by group: the norms and the clipped gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch

from engine.optimizer import PerGroupClippedAdamW


def optimizer(
    max_norm: float,
) -> tuple[PerGroupClippedAdamW, torch.nn.Parameter, torch.nn.Parameter]:
    head, body = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    groups = [{"name": "head", "params": [head]}, {"name": "body", "params": [body]}]
    return (
        PerGroupClippedAdamW(groups, max_norm=max_norm, sliced=False, lr=0.1),
        head,
        body,
    )


def test_step_clips_each_group_by_its_norm() -> None:
    adamw, head, body = optimizer(max_norm=1.0)
    head.grad, body.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.3, 0.4])
    adamw.step()
    torch.testing.assert_close(
        head.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0
    )  # 5 is too long
    assert torch.equal(
        body.grad, torch.tensor([0.0, 0.3, 0.4])
    )  # 0.5 is not, whatever the head's
    assert adamw.take_norms() == pytest.approx({"head": 5.0, "body": 0.5})


def test_step_with_max_norm_0_leaves_gradients() -> None:
    adamw, head, body = optimizer(max_norm=0.0)
    head.grad, body.grad = torch.tensor([3.0, 4.0]), torch.ones(3)
    adamw.step()
    assert torch.equal(head.grad, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_with_nonfinite_group_raises_and_keeps_weights(bad: float) -> None:
    adamw, head, body = optimizer(max_norm=1.0)
    head.grad, body.grad = torch.ones(2), torch.tensor([1.0, bad, 0.0])
    with pytest.raises(FloatingPointError, match="body"):
        adamw.step()
    assert torch.equal(head, torch.zeros(2))
    assert torch.equal(body, torch.zeros(3))


def test_take_norms_without_a_step_raises() -> None:
    adamw, head, body = optimizer(max_norm=1.0)
    head.grad, body.grad = torch.ones(2), torch.ones(3)
    adamw.step()
    adamw.take_norms()
    with pytest.raises(FloatingPointError, match="skipped"):
        adamw.take_norms()
