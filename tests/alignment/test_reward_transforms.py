"""Conditions, win rates, ranks and the norm over the batch, by hand and as advantages."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.advantages import group_relative_advantages
from alignment.config import GrpoConfig, RewardCondition
from alignment.rank_groups import RankGroups
from alignment.reward_transforms import (
    conditioned,
    normalised_over_batch,
    rank,
    win_rate,
)
from common.config import ConfigError, load
from common.types import Score
from launch.schemas.training import GrpoRun

NAN = math.nan


def advantages_of(
    rewards: dict[str, list[list[float]]], **options: object
) -> tuple[list[list[float]], dict[str, float]]:
    """Advantages and details of groups of rewards, all of weight 1 and without eps."""
    groups = len(next(iter(rewards.values())))
    size = len(next(iter(rewards.values()))[0])
    cfg = GrpoConfig(group_size=size, advantage_eps=0.0, **options)
    scores = {
        name: Score(torch.tensor(rows).flatten()) for name, rows in rewards.items()
    }
    found = group_relative_advantages(
        scores,
        dict.fromkeys(rewards, 1.0),
        cfg,
        RankGroups(size, 1),
        groups=groups,
    )
    return found.advantage_PM.tolist(), found.details


# ------------------------------------------------------------------ win rates


def test_win_rate_by_hand() -> None:
    """r = (0, 1, 3): sigmoids of -1 and -3, of 1 and -2, of 3 and 2; their sum is G / 2."""
    reward_PG = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    found = win_rate(reward_PG, temperature=1.0)
    assert found[0].tolist() == pytest.approx((0.1581836, 0.4251308, 0.9166856))
    assert float(found.sum()) == pytest.approx(1.5, rel=1e-14)
    # twice the temperature is half the reward
    assert torch.equal(
        win_rate(reward_PG, temperature=2.0), win_rate(reward_PG / 2, temperature=1.0)
    )
    near = win_rate(reward_PG, temperature=1e-3)
    assert near[0].tolist() == pytest.approx((0.0, 0.5, 1.0))


def test_rank_by_hand() -> None:
    reward_PG = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0], [1.0, 1.0, 5.0]])
    want = [[0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [0.25, 0.25, 1.0]]
    assert rank(reward_PG).tolist() == want


@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
def test_member_without_a_score_is_in_no_pair(missing: float) -> None:
    reward_PG = torch.tensor([[0.0, missing, 1.0], [missing, missing, 4.0]])
    found = win_rate(reward_PG, temperature=1.0)
    low = 1 / (1 + math.e)
    assert found[0, [0, 2]].tolist() == pytest.approx([low, 1 - low])
    assert found[1, 2] == 0.5
    assert found[0, 1].isnan()
    assert rank(reward_PG)[0].tolist() == pytest.approx([0.0, NAN, 1.0], nan_ok=True)


def test_equal_rewards_have_no_advantage_and_near_ones_a_small_one() -> None:
    """Win rates of 1e-3 apart differ by 2.5e-4; a clear group has the largest spread."""
    rows = [[0.1, 0.1], [0.0, 1e-3], [0.0, 100.0]]
    found, details = advantages_of(
        {"r": rows}, reward_transform="win_rate", win_temperature=1.0
    )
    assert found[0] == [0.0, 0.0]
    assert found[1] == pytest.approx([-5e-4, 5e-4], rel=1e-3)
    assert found[2] == pytest.approx([-1.0, 1.0])
    # metrics are the reward's own
    assert details["reward/r_group_std_max"] == pytest.approx(50.0)


def test_rank_ignores_the_size_of_a_lead() -> None:
    found, _ = advantages_of(
        {"r": [[0.0, 1e-3], [0.0, 100.0]]}, reward_transform="rank"
    )
    assert found == [[-1.0, 1.0], [-1.0, 1.0]]


# ------------------------------------------------------------------ several rewards

P_AND_Q = {"one": [[0.0, 1.0], [0.0, 1.0]], "two": [[0.0, 0.0], [0.0, 1.0]]}


def test_advantages_are_decoupled_then_normalised_over_the_batch() -> None:
    """GDPO's example: one reward of two tells P apart, both tell Q."""
    # summed first, P and Q would be alike
    decoupled, _ = advantages_of(P_AND_Q, scale="group")
    assert decoupled == [[-1.0, 1.0], [-2.0, 2.0]]
    found, _ = advantages_of(P_AND_Q, scale="group", advantage_norm="batch")
    assert found[0] == pytest.approx([-0.6324555, 0.6324555])
    assert found[1] == pytest.approx([-1.2649111, 1.2649111])


def test_group_without_advantage_stays_exactly_zero() -> None:
    """The mean of the batch is not 0 after a clip, and a flat group must not get it."""
    advantage_PG = torch.tensor([[0.0, 0.0], [-1.0, 2.0], [-1.0, 3.0]])
    found = normalised_over_batch(advantage_PG, eps=0.5)
    assert found[0].tolist() == [0.0, 0.0]
    mean, std = 0.5, math.sqrt((1 + 4 + 1 + 9) / 6 - 0.25)
    want = [(x - mean) / (std + 0.5) for x in (-1, 2, -1, 3)]
    assert found[1:].flatten().tolist() == pytest.approx(want)
    nothing = torch.zeros(2, 2)
    assert torch.equal(normalised_over_batch(nothing, eps=0.0), nothing)


def test_advantage_clip_bounds_the_normalised_sum() -> None:
    found, _ = advantages_of(
        P_AND_Q, scale="group", advantage_norm="batch", advantage_clip=1.0
    )
    assert found[1] == [-1.0, 1.0]
    assert found[0] == pytest.approx([-0.6324555, 0.6324555])


def test_conditioned_reward_gives_others_the_least_of_their_group() -> None:
    """Negative rewards: 0 would be the best. The threshold itself is met; no score is none."""
    reward_PG = torch.tensor([[-1.0, -5.0, -2.0, -3.0], [-1.0, NAN, -4.0, -2.0]])
    other_PG = torch.tensor([[0.5, 0.9, 0.1, NAN], [0.0, 0.0, 0.5, math.inf]])
    found = conditioned(reward_PG, other_PG, at_least=0.5)
    assert found[0].tolist() == pytest.approx([-1.0, -5.0, -5.0, NAN], nan_ok=True)
    assert found[1].tolist() == pytest.approx([-4.0, NAN, -4.0, NAN], nan_ok=True)


def test_condition_in_the_advantages() -> None:
    """Member 1 is the best by style, but not on the prompt: it falls to the least, 0."""
    rewards = {"style": [[0.0, 9.0, 4.0]], "match": [[1.0, 0.0, 1.0]]}
    given = {"style": RewardCondition("match", 0.5)}
    cfg = {"scale": "none", "reward_given": given}
    found, details = advantages_of(rewards, **cfg)
    style = [-4 / 3, -4 / 3, 8 / 3]
    match = [1 / 3, -2 / 3, 1 / 3]
    want = [a + b for a, b in zip(style, match, strict=True)]
    assert found[0] == pytest.approx(want)
    assert details["reward/style_met"] == pytest.approx(2 / 3)
    assert "reward/match_met" not in details


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"reward_transform": "win_rate"}, "win_temperature"),
        ({"win_temperature": 1.0}, "win_temperature"),
        (
            {"reward_transform": "win_rate", "win_temperature": 1.0, "scale": "group"},
            "scale=none or max_group",
        ),
        ({"reward_transform": "rank", "scale": "group"}, "scale=none or max_group"),
        ({"advantage_norm": "batch", "scale": "none"}, "scale=group or max_group"),
        ({"advantage_norm": "batch", "scale": "batch"}, "scale=group or max_group"),
        ({"reward_given": {"a": RewardCondition("a", 0.0)}}, r"reward_given\.a"),
    ],
)
def test_advantages_on_a_scale_that_does_not_fit_are_refused(
    options: dict, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        GrpoConfig(**options)


def test_condition_on_a_reward_that_is_not_there_is_refused() -> None:
    words = ["run_dir=x", "prompts=x", "generator.path=x", "rewards.brightness={}"]
    given = "grpo.reward_given.brightness={reward: brigthness, at_least: 1}"
    with pytest.raises(ConfigError, match="brigthness"):
        load(GrpoRun, None, [*words, given])
