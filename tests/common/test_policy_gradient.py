from __future__ import annotations

import math

import pytest
import torch

from common.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    group_std,
    k3_kl,
    masked_mean,
    token_surrogate,
)

NAN, INF = math.nan, math.inf


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# rows: mean 2, std sqrt(2/3); mean 4, std 4
REWARD_PG = tensor([1.0, 2.0, 3.0, NAN], [0.0, 8.0, 0.0, 8.0])
SMALL, LARGE = math.sqrt(2.0 / 3.0), 4.0


class TestGroupAdvantages:
    def test_group_by_hand(self):
        got = group_advantages(REWARD_PG, scale="group", eps=0.5)
        a = 1.0 / (SMALL + 0.5)
        b = 4.0 / 4.5
        torch.testing.assert_close(got, tensor([-a, 0.0, a, 0.0], [-b, b, -b, b]))

    def test_none_only_centres(self):
        got = group_advantages(REWARD_PG, scale="none")
        torch.testing.assert_close(
            got, tensor([-1.0, 0.0, 1.0, 0.0], [-4.0, 4.0, -4.0, 4.0])
        )

    def test_max_group_divides_every_row_by_the_largest_spread(self):
        got = group_advantages(REWARD_PG, scale="max_group", eps=1e-4)
        d = 1.0 / (LARGE + 1e-4)
        torch.testing.assert_close(
            got, tensor([-d, 0.0, d, 0.0], [-4 * d, 4 * d, -4 * d, 4 * d])
        )

    def test_group_with_fewer_than_two_scores_is_zero(self):
        reward_PG = tensor([NAN, 1e9, NAN], [NAN, NAN, NAN], [1.0, 3.0, NAN])
        got = group_advantages(reward_PG, scale="max_group", eps=0.0)
        torch.testing.assert_close(got, tensor([0.0] * 3, [0.0] * 3, [-1.0, 1.0, 0.0]))
        assert group_std(reward_PG).tolist() == [0.0, 0.0, 1.0]

    def test_infinite_is_unscored(self):
        got = group_advantages(tensor([1.0, INF, 3.0, -INF]), scale="group", eps=0.0)
        torch.testing.assert_close(got, tensor([-1.0, 0.0, 1.0, 0.0]))

    @pytest.mark.parametrize("scale", ["none", "group", "max_group"])
    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1, -3.3e-7])
    def test_reward_without_spread_has_zero_advantage(self, scale, value):
        # three times 0.1 has a mean that is not 0.1: only a comparison finds the row flat
        got = group_advantages(torch.full((2, 3), value), scale=scale, eps=0.0)
        assert torch.equal(got, torch.zeros(2, 3))

    def test_row_without_spread_has_zero_advantage_under_max_group(self):
        got = group_advantages(
            tensor([0.1, 0.1, 0.1], [0.0, 0.3, 0.6]), scale="max_group"
        )
        assert got[0].tolist() == [0.0, 0.0, 0.0]
        assert got[1].abs().sum() > 1.0

    def test_invariants(self):
        reward_PG = torch.randn(6, 5, dtype=torch.float64)
        got = group_advantages(reward_PG, scale="group", eps=0.0)
        torch.testing.assert_close(
            got.mean(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            got.std(1, correction=0), torch.ones(6, dtype=torch.float64)
        )
        torch.testing.assert_close(
            group_advantages(3.0 * reward_PG + 7.0, scale="group", eps=0.0), got
        )
        swap = torch.tensor([4, 2, 0, 1, 3])
        torch.testing.assert_close(
            group_advantages(reward_PG[:, swap], scale="group", eps=0.0), got[:, swap]
        )

    def test_dtype_is_fp32_at_least(self):
        assert (
            group_advantages(torch.ones(1, 2, dtype=torch.bfloat16), scale="none").dtype
            == torch.float32
        )
        assert group_advantages(tensor([1.0, 2.0]), scale="none").dtype == torch.float64

    def test_reward_that_is_no_matrix_is_refused(self):
        with pytest.raises(ValueError, match="P, G"):
            group_advantages(torch.zeros(4), scale="group")


class TestClippedSurrogate:
    LOG_PROB = torch.tensor([1.5, 0.5, 1.05, 3.0], dtype=torch.float64).log()
    OLD = torch.zeros(4, dtype=torch.float64)
    ADVANTAGE = torch.tensor([1.0, -2.0, 2.0, -1.0], dtype=torch.float64)

    def test_by_hand(self):
        out = clipped_surrogate(
            self.LOG_PROB, self.OLD, self.ADVANTAGE, clip_low=0.1, clip_high=0.2
        )
        # min(1.5, 1.2), min(-1, -1.8), min(2.1, 2.1), min(-3, -1.2) -> 1.2 - 1.8 + 2.1 - 3 = -1.5
        assert out.loss.item() == pytest.approx(1.5 / 4)
        assert out.metrics["clip_frac"] == pytest.approx(0.5)
        assert out.metrics["ratio_mean"] == pytest.approx((1.5 + 0.5 + 1.05 + 3.0) / 4)
        assert out.metrics["ratio_dev"] == pytest.approx(2.0)

    def test_dual_clip_bounds_a_negative_advantage(self):
        out = token_surrogate(
            self.LOG_PROB[None],
            self.OLD[None],
            self.ADVANTAGE[None],
            mask=torch.ones(1, 4),
            count=4,
            clip_low=0.1,
            clip_high=0.2,
            dual_clip=2.0,
        )
        # the last element's -3 becomes 2 * -1 = -2
        assert out.loss.item() == pytest.approx((-1.2 + 1.8 - 2.1 + 2.0) / 4)
        assert out.metrics["clip_frac"] == pytest.approx(0.75)

    def test_gradient_stops_where_a_clip_binds(self):
        log_prob = self.LOG_PROB.clone().requires_grad_()
        clipped_surrogate(
            log_prob, self.OLD, self.ADVANTAGE, clip_low=0.1, clip_high=0.2
        ).loss.backward()
        # -r A / 4 where it counts: elements 3 and 4
        expected = torch.tensor(
            [0.0, 0.0, -1.05 * 2.0 / 4, 3.0 / 4], dtype=torch.float64
        )
        torch.testing.assert_close(log_prob.grad, expected)

    def test_first_pass_is_the_plain_policy_gradient(self):
        log_prob = torch.randn(5, dtype=torch.float64, requires_grad=True)
        advantage = torch.randn(5, dtype=torch.float64)
        out = clipped_surrogate(
            log_prob, log_prob, advantage, clip_low=1e-4, clip_high=1e-4
        )
        out.loss.backward()
        torch.testing.assert_close(log_prob.grad, -advantage / 5)
        assert out.metrics == {
            "ratio_mean": 1.0,
            "ratio_dev": 0.0,
            "clip_frac": 0.0,
        }

    def test_infinite_clip_equals_no_clip(self):
        out = clipped_surrogate(
            self.LOG_PROB, self.OLD, self.ADVANTAGE, clip_low=INF, clip_high=INF
        )
        assert out.loss.item() == pytest.approx(-(1.5 - 1.0 + 2.1 - 3.0) / 4)
        assert out.metrics["clip_frac"] == 0.0

    def test_unfit_arguments_are_refused(self):
        x = torch.zeros(3)
        with pytest.raises(
            ValueError, match="shapes"
        ):  # (3,) against (3, 1) would broadcast to (3, 3)
            clipped_surrogate(x, x, x[:, None], clip_low=0.1, clip_high=0.1)


class TestTokens:
    def test_unequal_micro_batches_equal_one_batch(self):
        log_prob, old = (
            torch.randn(6, 7, dtype=torch.float64) * 0.2,
            torch.randn(6, 7, dtype=torch.float64) * 0.2,
        )
        advantage_B1 = torch.randn(6, 1, dtype=torch.float64)
        mask = torch.arange(7) < torch.tensor([1, 7, 3, 2, 6, 4])[:, None]
        count, clips = (
            float(mask.sum()),
            {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": 3.0},
        )
        assert count == 23

        def gradient(*slices: slice) -> torch.Tensor:
            leaf = log_prob.clone().requires_grad_()
            for s in slices:
                token_surrogate(
                    leaf[s], old[s], advantage_B1[s], mask=mask[s], count=count, **clips
                ).loss.backward()
            return leaf.grad

        whole = gradient(slice(0, 6))
        torch.testing.assert_close(
            gradient(slice(0, 1), slice(1, 3), slice(3, 6)), whole
        )
        # and the whole is the mean over the 23 tokens laid out flat
        flat = log_prob.clone().requires_grad_()
        spread = advantage_B1.expand(6, 7)
        everything = torch.ones(1, 23)
        token_surrogate(
            flat[mask][None],
            old[mask][None],
            spread[mask][None],
            mask=everything,
            count=23,
            **clips,
        ).loss.backward()
        torch.testing.assert_close(flat.grad, whole)

    def test_masked_values_do_not_matter(self):
        log_prob = torch.tensor([[0.1, NAN, 200.0]], requires_grad=True)
        old = torch.tensor([[0.0, 0.0, -INF]])
        mask = torch.tensor([[True, False, False]])
        out = token_surrogate(
            log_prob,
            old,
            torch.tensor([[2.0]]),
            clip_low=0.5,
            clip_high=0.5,
            mask=mask,
            count=torch.tensor(4.0),
        )
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-2.0 * math.exp(0.1) / 4)
        torch.testing.assert_close(
            log_prob.grad, torch.tensor([[-2.0 * math.exp(0.1) / 4, 0.0, 0.0]])
        )
        assert out.metrics["ratio_mean"] == pytest.approx(math.exp(0.1))

    def test_an_unfit_advantage_or_count_is_refused(self):
        x, mask = torch.zeros(2, 3), torch.ones(2, 3)
        with pytest.raises(ValueError, match="advantage"):
            token_surrogate(
                x, x, torch.zeros(3), clip_low=0.1, clip_high=0.1, mask=mask, count=6
            )
        with pytest.raises(ValueError, match="count"):
            token_surrogate(
                x, x, torch.zeros(2, 1), clip_low=0.1, clip_high=0.1, mask=mask, count=0
            )


class TestMaskedMean:
    def test_divides_by_the_mask_or_the_count(self):
        x, mask = torch.tensor([1.0, 2.0, NAN, 6.0]), torch.tensor([1, 1, 0, 1])
        assert masked_mean(x, mask).item() == 3.0
        assert masked_mean(x, mask, count=18.0).item() == 0.5

    def test_an_empty_mask_is_zero_with_zero_gradient(self):
        x = torch.ones(3, requires_grad=True)
        loss = masked_mean(x, torch.zeros(3))
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad.tolist() == [0.0, 0.0, 0.0]


class TestKl:
    def test_by_hand(self):
        log_prob, ref = torch.tensor([0.0, -1.0]), torch.tensor([-0.5, -0.2])
        expected = torch.tensor([math.exp(-0.5) - 1 + 0.5, math.exp(0.8) - 1 - 0.8])
        torch.testing.assert_close(k3_kl(log_prob, ref), expected)

    def test_k3_averages_to_the_exact_divergence(self):
        p, q = (
            torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
            torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64),
        )
        exact = 0.2 * math.log(0.5) + 0.5 * math.log(1.25) + 0.3 * math.log(1.5)
        assert (p * k3_kl(p.log(), q.log())).sum().item() == pytest.approx(exact)
        assert (k3_kl(p.log(), q.log()) >= 0).all()


def test_the_spread_of_the_batch_by_hand() -> None:
    """Rewards 1, 3 | 10, 14: mean 7 and population variance (36 + 16 + 9 + 49) / 4."""
    reward_PG = torch.tensor([[1.0, 3.0], [10.0, 14.0]], dtype=torch.float64)
    std = math.sqrt(110 / 4)
    found = group_advantages(reward_PG, scale="batch", eps=0.0)
    assert found.flatten().tolist() == pytest.approx(
        [-1 / std, 1 / std, -2 / std, 2 / std]
    )
    unjudged = torch.tensor(
        [[1.0, 3.0, math.nan], [10.0, 14.0, math.nan]], dtype=torch.float64
    )
    assert group_advantages(unjudged, scale="batch", eps=0.0)[:, :2].equal(found)


def test_group_advantages_with_correction_divide_by_the_sample_std() -> None:
    """Rewards 0, 0, 3 and one missing: mean 1, squares 6, over 3 - 1 members: std sqrt(3)."""
    reward = torch.tensor([[0.0, 0.0, 3.0, math.nan], [5.0, math.nan, math.nan, 4.0]])
    found = group_advantages(reward, scale="group", eps=0.0, correction=1)
    root = 3**0.5
    assert found[0].tolist() == pytest.approx([-1 / root, -1 / root, 2 / root, 0.0])
    # 5 and 4: mean 4.5, squares 0.5, over 1 member
    half = 0.5 / 0.5**0.5
    assert found[1].tolist() == pytest.approx([half, 0.0, 0.0, -half])
