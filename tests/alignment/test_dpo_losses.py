"""Flow-DPO's loss against numbers by hand and against the paper's pseudo-code."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.dpo_losses import beta_at, flow_dpo_terms, rwr_weights

DOUBLE = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_flow_dpo_terms_by_hand() -> None:
    """d_c = -0.1, d_r = 0.02; -(10 / 2) (-0.12) = 0.6; log(1 + e^-0.6). Then swapped, beta 20."""
    terms = flow_dpo_terms(
        tensor(0.9, 1.02),
        tensor(1.02, 0.9),
        tensor(1.0, 1.0),
        tensor(1.0, 1.0),
        beta_N=tensor(10.0, 20.0),
    )
    by_hand = [math.log(1 + math.exp(-0.6)), math.log(1 + math.exp(1.2))]
    assert terms.loss_N.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert terms.chosen_change_N.tolist() == pytest.approx([-0.1, 0.02])
    assert terms.rejected_change_N.tolist() == pytest.approx([0.02, -0.1])


def test_flow_dpo_loss_at_the_reference_is_log_2() -> None:
    errors = torch.rand(2, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    terms = flow_dpo_terms(
        errors[0],
        errors[1],
        errors[0],
        errors[1],
        beta_N=torch.full((7,), 500.0, dtype=DOUBLE),
    )
    assert terms.loss_N.tolist() == pytest.approx([math.log(2)] * 7, rel=1e-12)
    assert not terms.chosen_change_N.any()
    assert not terms.rejected_change_N.any()


def test_gradient_lowers_the_chosen_and_raises_the_rejected_error() -> None:
    """d loss / d chosen = beta / 2 sigmoid(beta / 2 (d_c - d_r)): beta / 4 at first."""
    chosen = tensor(0.5, 0.7).requires_grad_()
    rejected = tensor(0.6, 0.4).requires_grad_()
    terms = flow_dpo_terms(
        chosen, rejected, chosen.detach(), rejected.detach(), beta_N=tensor(8.0, 8.0)
    )
    terms.loss_N.mean().backward()
    assert chosen.grad.tolist() == pytest.approx([1.0, 1.0])  # 8 / 4, over two pairs
    assert rejected.grad.tolist() == pytest.approx([-1.0, -1.0])
    far = tensor(0.5).requires_grad_()
    terms = flow_dpo_terms(
        far, tensor(1.0), tensor(1.0), tensor(1.0), beta_N=tensor(8.0)
    )
    terms.loss_N.mean().backward()
    assert float(far.grad) == pytest.approx(4 / (1 + math.exp(2.0)))


def test_reference_gets_no_gradient() -> None:
    reference = tensor(1.0).requires_grad_()
    terms = flow_dpo_terms(
        tensor(0.5).requires_grad_(),
        tensor(1.0),
        reference,
        tensor(1.0),
        beta_N=tensor(8.0),
    )
    terms.loss_N.mean().backward()
    assert reference.grad is None


def test_flow_dpo_equals_the_papers_pseudo_code_on_sums() -> None:
    """Appendix C of 2501.13918 uses SUMS: its beta is ours over the number of elements."""
    draw = torch.Generator().manual_seed(3)
    v_chosen, v_rejected, own_chosen, own_rejected, ref_chosen, ref_rejected = (
        torch.randn(6, 5, 48, dtype=DOUBLE, generator=draw)
    )
    beta = 3.0
    difference = (
        (v_chosen - own_chosen).norm(dim=1) ** 2
        - (v_chosen - ref_chosen).norm(dim=1) ** 2
    ) - (
        (v_rejected - own_rejected).norm(dim=1) ** 2
        - (v_rejected - ref_rejected).norm(dim=1) ** 2
    )
    want = -(1 / (1 + (0.5 * beta * difference).exp())).log().mean()

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean(dim=1)

    terms = flow_dpo_terms(
        mean(v_chosen, own_chosen),
        mean(v_rejected, own_rejected),
        mean(v_chosen, ref_chosen),
        mean(v_rejected, ref_rejected),
        beta_N=torch.full((5,), beta * 48, dtype=DOUBLE),
    )
    assert float(terms.loss_N.mean()) == pytest.approx(float(want), rel=1e-12)


def test_beta_schedules() -> None:
    sigma = tensor(0.0, 0.25, 1.0)
    assert beta_at(sigma, beta=500.0, schedule="constant").tolist() == [
        500.0,
        500.0,
        500.0,
    ]
    assert beta_at(sigma, beta=500.0, schedule="quadratic").tolist() == [
        500.0,
        281.25,
        0.0,
    ]


def test_rwr_weights_by_hand() -> None:
    weights = rwr_weights(tensor(0.0, math.log(2), math.log(3)), temperature=1.0)
    assert weights.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert rwr_weights(
        tensor(0.0, math.log(2), math.log(3)) * 7, temperature=7.0
    ).tolist() == pytest.approx([0.5, 1, 1.5])
    assert bool(rwr_weights(tensor(0.0, 2000.0), temperature=1.0).isfinite().all())
    with pytest.raises(ValueError, match=r"\b1\b"):
        rwr_weights(tensor(0.0, math.nan), temperature=1.0)
