"""Wrong values are named with their field."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config import GrpoConfig, RewardConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 1}, r"GrpoConfig\.group_size must be at least 2.*got 1"),
        (
            {"kl_weight": -1e-3},
            r"GrpoConfig\.kl_weight must be at least 0, got -0\.001",
        ),
        (
            {"clip_low": 1e-3},
            r"GrpoConfig\.clip_low and clip_high go together, got 0\.001 and None",
        ),
        (
            {"clip_low": 0.0, "clip_high": 0.1},
            r"GrpoConfig\.clip_low must be positive or null, got 0\.0",
        ),
        (
            {"advantage_clip": 0.0},
            r"GrpoConfig\.advantage_clip must be positive or null, got 0\.0",
        ),
        (
            {"advantage_eps": -1.0, "group_size": 0},
            r"group_size.*got 0; GrpoConfig\.advantage_eps.*got -1\.0",
        ),
    ],
)
def test_grpo_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**values)


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


def test_reward_values() -> None:
    with pytest.raises(
        ValueError, match=r"RewardConfig\.weight must be finite, got inf"
    ):
        RewardConfig(weight=float("inf"))
    with pytest.raises(ValueError, match=r"RewardConfig\.kind must be a name or null"):
        RewardConfig(kind="")
