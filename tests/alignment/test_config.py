"""Wrong values are reported with their field."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config import GrpoConfig, RewardConfig


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"group_size": 1}, ["group_size"]),
        ({"kl_weight": -1e-3}, ["kl_weight", "-0.001"]),
        ({"clip_low": 1e-3}, ["clip_low", "clip_high", "0.001"]),
        ({"clip_low": 0.0, "clip_high": 0.1}, ["clip_low", "0.0"]),
        ({"advantage_clip": 0.0}, ["advantage_clip", "0.0"]),
        ({"advantage_eps": -1.0, "group_size": 0}, ["group_size", "advantage_eps"]),
    ],
)
def test_grpo_value_outside_its_limits_names_the_field(
    values: dict[str, Any], fields: list[str]
) -> None:
    with pytest.raises(ValueError, match="GrpoConfig") as raised:
        GrpoConfig(**values)
    for field in fields:
        assert field in str(raised.value)


def test_defaults_are_the_papers() -> None:
    """LongCat-Video Table 9: group size 4, KL 3e-4; Algorithm 1: largest group spread, no clip."""
    cfg = GrpoConfig()
    assert (cfg.group_size, cfg.kl_weight, cfg.scale, cfg.clip_low, cfg.clip_high) == (
        4,
        3e-4,
        "max_group",
        None,
        None,
    )


def test_reward_value_outside_its_limits_names_the_field() -> None:
    with pytest.raises(ValueError, match="weight"):
        RewardConfig(weight=float("inf"))
    with pytest.raises(ValueError, match="kind"):
        RewardConfig(kind="")
