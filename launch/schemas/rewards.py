"""Mappings of rewards, checked as far as possible without loading one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from alignment.config import RewardConfig
from alignment.rewards import factory_of


def _check_kinds(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Raise ValueError for an unknown kind, a target without a file, a wrong address."""
    for name, reward in rewards.items():
        factory_of(name, reward)
    return rewards


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
