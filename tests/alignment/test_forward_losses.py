"""Losses of the forward objectives, by hand at x_0 = (1, -1), eps = (0, 2), s = 1/2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignment.dpo_losses import flow_dpo_terms
from alignment.forward_losses import awm_loss, dgpo_loss, matching_error, nft_loss

OLD = (0.0, 2.0)
# v = eps - x_0, and a policy that has moved.
TARGET = (-1.0, 3.0)
MOVED = (1.0, 2.0)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def nft(
    advantage: float, *, at: tuple[float, float] = MOVED, beta: float, **options: bool
) -> tuple[float, list[float]]:
    """Loss and gradient with respect to the policy's velocity."""
    v = row(*at).requires_grad_()
    old = row(*OLD).requires_grad_()
    output = nft_loss(
        v,
        old,
        row(*TARGET),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        beta=beta,
        advantage_clip=5.0,
        **options,
    )
    (gradient,) = torch.autograd.grad(output.loss, v)
    assert torch.autograd.grad(nft_again(v, old), old, allow_unused=True)[0] is None
    return float(output.loss.detach()), gradient[0].tolist()


def nft_again(v: Tensor, old: Tensor) -> Tensor:
    """A loss whose old policy is a leaf: no gradient may reach it."""
    half = torch.tensor([0.5], dtype=torch.float64)
    output = nft_loss(v, old, row(*TARGET), half, half, beta=1.0, advantage_clip=5.0)
    return output.loss


@pytest.mark.parametrize(
    ("advantage", "beta", "loss", "gradient"),
    [
        # r 0.75: L+ = 0.625 / 0.75 and L- = 0.125 / 0.25, m = 5
        (2.5, 1.0, 3.75, (2.5, 0.0)),
        (2.5, 0.1, 25.686090, (1.3722, -1.1278)),
        (-5.0, 1.0, 2.5, (0.0, 5.0)),
        (0.0, 1.0, 3.333333, None),
        # beyond the clip r stays 0
        (-50.0, 1.0, 2.5, (0.0, 5.0)),
    ],
)
def test_nft_loss_by_hand(
    advantage: float, beta: float, loss: float, gradient: tuple | None
) -> None:
    found, slope = nft(advantage, beta=beta)
    assert found == pytest.approx(loss, abs=1e-6)
    if gradient is not None:
        assert slope == pytest.approx(gradient, abs=5e-5)


@pytest.mark.parametrize(("beta", "loss"), [(1.0, 2.5), (0.1, 13.1875)])
def test_nft_loss_without_adaptive_weight(beta: float, loss: float) -> None:
    """The closed form in e = v_old - v = (1, -1) and d = v_theta - v_old = (1, 0)."""
    found, _ = nft(2.5, beta=beta, adaptive_weight=False)
    assert found == pytest.approx(loss, rel=1e-12)
    closed = 0.25 * 5 * (1.0 / beta + 2 * 0.5 * 0.5 + beta * 0.5)
    assert closed == pytest.approx(loss)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_on_policy_is_the_weighted_flow_error_whatever_beta(beta: float) -> None:
    """A grad( s^2 mean e^2 / mean|s e| ) = 2.5 (1/4, -1/4) / (1/2); plain 2.5 (1/4, -1/4)."""
    _, adaptive = nft(2.5, at=OLD, beta=beta)
    assert adaptive == pytest.approx((1.25, -1.25), rel=1e-12)
    _, plain = nft(2.5, at=OLD, beta=beta, adaptive_weight=False)
    assert plain == pytest.approx((0.625, -0.625), rel=1e-12)


def test_nft_is_even_in_the_advantage_and_the_move_together() -> None:
    """-A with v_theta - v_old negated changes v+ with v-, and so nothing."""
    mirrored = tuple(2 * old - now for old, now in zip(OLD, MOVED, strict=True))
    for beta in (1.0, 0.3):
        want, _ = nft(2.5, beta=beta)
        got, _ = nft(-2.5, at=mirrored, beta=beta)
        assert got == pytest.approx(want, rel=1e-12)


def test_nft_divides_a_vanishing_error_by_its_floor() -> None:
    """v+ = v: e+ = 0; without a floor 0 / 0."""
    output = nft_loss(
        row(*TARGET),
        row(*TARGET),
        row(*TARGET),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([5.0], dtype=torch.float64),
        beta=1.0,
        advantage_clip=5.0,
    )
    assert float(output.loss) == 0.0
    # an absolute error of 1e-6 is divided by 1e-5
    near = row(-1.0 + 2e-6, 3.0 - 2e-6)
    output = nft_loss(
        near,
        near,
        row(*TARGET),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([5.0], dtype=torch.float64),
        beta=1.0,
        advantage_clip=5.0,
    )
    assert float(output.loss) == pytest.approx(5 * 1e-12 / 1e-5)


def test_nft_loss_is_the_mean_over_samples() -> None:
    """Two samples with their own levels: the means of the separate losses, and metrics."""
    v = torch.tensor([MOVED, MOVED], dtype=torch.float64)
    old = torch.tensor([OLD, OLD], dtype=torch.float64)
    target = torch.tensor([TARGET, TARGET], dtype=torch.float64)
    output = nft_loss(
        v,
        old,
        target,
        torch.tensor([0.5, 0.25]),
        torch.tensor([2.5, 2.5]),
        beta=1.0,
        advantage_clip=5.0,
    )
    # errors are s^2, weights s: half the level halves the loss
    assert float(output.loss) == pytest.approx((3.75 + 3.75 / 2) / 2)
    assert output.metrics == pytest.approx({"flow_error": 2.5, "old_distance": 0.5})


@pytest.mark.parametrize(
    ("weighting", "value", "slope"),
    [
        ("ghuber", 1.6754683, 0.8408964),
        ("uniform", 0.5, 1.0),
        ("t", 0.25, 0.5),
        ("t2", 0.125, 0.25),
        ("huber", 0.5 * math.sqrt(0.5), 0.5 / (2 * math.sqrt(0.5))),
    ],
)
def test_matching_error_by_hand(weighting: str, value: float, slope: float) -> None:
    """mse 1/2 at s = 1/2."""
    mse_B = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    sigma_B = torch.tensor([0.5], dtype=torch.float64)
    error_B = matching_error(mse_B, sigma_B, weighting=weighting)
    assert float(error_B.detach()) == pytest.approx(value, abs=1e-7)
    (gradient,) = torch.autograd.grad(error_B.sum(), mse_B)
    assert float(gradient) == pytest.approx(slope, abs=1e-7)


def awm(
    advantage: float,
    *,
    at: tuple[float, float] = OLD,
    **options: float | str,
) -> tuple[float, list[float], dict[str, float]]:
    v = row(*at).requires_grad_()
    output = awm_loss(
        v,
        row(*OLD),
        row(*TARGET),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        **{"weighting": "t2", **options},
    )
    (gradient,) = torch.autograd.grad(output.loss, v)
    return float(output.loss.detach()), gradient[0].tolist(), output.metrics


def test_awm_on_policy_is_the_advantage_times_the_error_gradient() -> None:
    """With t^2 it is NFT's plain gradient, and the value is -A at a ratio of 1."""
    loss, gradient, metrics = awm(2.5)
    assert loss == pytest.approx(-2.5)
    assert gradient == pytest.approx((0.625, -0.625), rel=1e-12)
    assert metrics["old_distance"] == 0.0
    # mse = 1: df / dmse of ghuber is s, twice that of t^2
    assert awm(2.5, weighting="ghuber")[1] == pytest.approx((1.25, -1.25), rel=1e-6)


def test_awm_ratio_clip_and_proximal_term_by_hand() -> None:
    """MOVED has mse 2.5 instead of 1: with t^2 log ratio = -(2.5 - 1) / 4 = -0.375."""
    ratio = math.exp(-0.375)
    loss, gradient, metrics = awm(2.0, at=MOVED)
    assert loss == pytest.approx(-2.0 * ratio)
    # -2 ratio times -1/4 d mse, d mse = e = (2, -1)
    assert gradient == pytest.approx((2.0 * ratio * 0.5, -2.0 * ratio * 0.25))
    assert metrics["clip_frac"] == 0.0

    # a bad member is not pushed below 1 - 0.2
    loss, gradient, metrics = awm(-2.0, at=MOVED, clip_low=0.2, clip_high=0.2)
    assert loss == pytest.approx(2.0 * 0.8)
    assert gradient == [0.0, 0.0]
    assert metrics["clip_frac"] == 1.0
    # a good one comes back
    assert awm(2.0, at=MOVED, clip_low=0.2, clip_high=0.2)[0] == pytest.approx(
        -2.0 * ratio
    )

    # nearer to the target, mse 0.25: log ratio = 0.75 / 4, and the upper clip is another one
    near = (-0.5, 2.5)
    loss, gradient, metrics = awm(2.0, at=near, clip_low=0.9, clip_high=0.1)
    assert loss == pytest.approx(-2.0 * 1.1)
    assert gradient == [0.0, 0.0]
    assert metrics["clip_frac"] == 1.0
    assert awm(2.0, at=near, clip_low=0.1, clip_high=0.9)[0] == pytest.approx(
        -2.0 * math.exp(0.1875)
    )

    # 3 mean d^2 = 1.5, with the gradient 3 d
    with_term, pulled, _ = awm(2.0, at=MOVED, proximal_weight=3.0)
    assert with_term == pytest.approx(-2.0 * ratio + 1.5)
    assert pulled == pytest.approx((ratio + 3.0, -0.5 * ratio))


def dgpo(
    error: tuple[float, ...], advantage: tuple[float, ...], *, beta: float = 10.0
) -> tuple[float, list[float], dict[str, float]]:
    """Loss, its gradient with respect to each error, and metrics; the reference's errors are 1."""
    # one element, target 0: the error is the square of the velocity
    v = torch.tensor(error, dtype=torch.float64).sqrt()[:, None].requires_grad_()
    reference = torch.ones_like(v).requires_grad_()
    output = dgpo_loss(
        v,
        reference,
        torch.zeros_like(v),
        torch.tensor(advantage, dtype=torch.float64),
        beta=beta,
    )
    slope, nothing = torch.autograd.grad(output.loss, (v, reference), allow_unused=True)
    assert nothing is None
    # de = 2 v dv
    gradient = (slope / (2 * v)).detach()[:, 0].tolist()
    return float(output.loss.detach()), gradient, output.metrics


def test_dgpo_loss_by_hand() -> None:
    """S = 10 (0.9 - 1 - (1.1 - 1)) / 2 = -1: weight 0.26894142, loss of it times -0.1."""
    loss, gradient, metrics = dgpo((0.9, 1.1), (1.0, -1.0))
    assert metrics["group_weight"] == pytest.approx(0.26894142, abs=1e-8)
    assert metrics["flow_error"] == pytest.approx(1.0)
    assert loss == pytest.approx(-0.1 * 0.26894142, abs=1e-9)
    assert gradient == pytest.approx((0.13447071, -0.13447071), abs=1e-8)
    # the reference itself: S = 0 is half of the advantage-weighted error
    loss, gradient, metrics = dgpo((1.0, 1.0), (1.0, -1.0))
    assert metrics["group_weight"] == 0.5
    assert gradient == pytest.approx((0.25, -0.25))
    # three members: S = 10 (-0.1 - 0.1) / 3
    _, gradient, metrics = dgpo((0.9, 1.0, 1.1), (1.0, 0.0, -1.0))
    weight = 1 / (1 + math.exp(2 / 3))
    assert metrics["group_weight"] == pytest.approx(weight)
    assert gradient == pytest.approx((weight / 3, 0.0, -weight / 3))


def test_dgpo_of_two_videos_is_flow_dpo() -> None:
    """The loss 0.31326169 and its gradients 1.3447, by the function of pairs."""
    chosen = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.1], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    terms = flow_dpo_terms(chosen, rejected, one, one, beta_N=10 * one)
    assert float(terms.loss_N.detach()) == pytest.approx(0.31326169, abs=1e-8)
    pair = torch.autograd.grad(terms.loss_N.sum(), (chosen, rejected))
    assert float(pair[0]) == pytest.approx(1.3447071, abs=1e-6)
    _, gradient, _ = dgpo((0.9, 1.1), (1.0, -1.0))
    assert [10 * g for g in gradient] == pytest.approx([float(g) for g in pair])


def test_dgpo_error_is_the_mean_over_elements_of_a_sample() -> None:
    """v - target = (2, -1): 2.5, where the reference's (1, -1) has 1; A 2, beta 0.5: S = 1.5."""
    output = dgpo_loss(
        row(*MOVED), row(*OLD), row(*TARGET), torch.tensor([2.0]), beta=0.5
    )
    assert output.metrics["flow_error"] == pytest.approx(2.5)
    weight = 1 / (1 + math.exp(-1.5))
    assert output.metrics["group_weight"] == pytest.approx(weight)
    assert float(output.loss) == pytest.approx(5 * weight)
