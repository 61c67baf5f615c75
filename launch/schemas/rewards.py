"""Mappings of rewards, checked as far as possible without loading one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from alignment.config import RewardConfig
from alignment.rewards import factory_of
from rm.scorer_options import check_thinking


def _check_kinds(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Raise ValueError for an unknown kind, a target without a file, a wrong address.

    And for options of a DeScore that do not fit together.
    """
    for name, reward in rewards.items():
        factory_of(name, reward)
        if reward.is_kind(name, "descore"):
            try:
                check_thinking(reward.options)
            except ValueError as error:
                raise ValueError(f"{name}.options: {error}") from error
    return rewards


def check_whole_groups(
    rewards: Mapping[str, RewardConfig], ranks_per_group: int
) -> None:
    """Raise ValueError for groups that ranks share and a DeScore that thinks when unsure."""
    if ranks_per_group == 1:
        return
    for name, reward in rewards.items():
        if reward.thinks_when_unsure(name):
            raise ValueError(
                f"rewards.{name}.options.thinking=adaptive needs every group on one rank: "
                f"grpo.ranks_per_group must be 1, got {ranks_per_group}"
            )


def check_some_weight(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Raise ValueError when every weight is 0, so that nothing could be learned."""
    if all(reward.weight == 0 for reward in rewards.values()):
        raise ValueError(
            "rewards need one weight that is not 0, else nothing is learned"
        )
    return rewards


# Any number of rewards, for commands that may need none.
Rewards = Annotated[dict[str, RewardConfig], AfterValidator(_check_kinds)]
# At least one, whatever its weight: for commands that score.
ScoringRewards = Annotated[Rewards, Field(min_length=1)]
# At least one whose weight is not 0: for commands that train or choose.
TrainingRewards = Annotated[ScoringRewards, AfterValidator(check_some_weight)]
