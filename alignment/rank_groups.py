"""Share the members of a group between ranks, and gather whole groups from all ranks.

Ranks that compute each sample together (``ranks_per_sample`` above 1) hold the same members.
M is the number of a group's members on one rank: G with ``ranks_per_group`` of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.distributed import gather_rows, rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.rewards.errors import NamedReward


@dataclass(frozen=True)
class RankGroups:
    """The layout of groups over ranks: consecutive ranks form a shard.

    Each shard gets its part of a step's prompts. Its ranks are ``ranks_per_group`` sets of
    ``ranks_per_sample`` consecutive ranks. Every rank of a set holds the same M members of
    every group of the shard; the ranks of a set take turns in scoring groups.
    """

    group_size: int
    ranks_per_group: int
    ranks_per_sample: int = 1

    def check(self, rewards: Iterable[NamedReward]) -> None:
        """Raise ValueError for rewards that compare members which several ranks share.

        And for those that say that they cannot compare as many as a group has.
        """
        for reward in rewards:
            check_size = getattr(reward.reward, "check_group_size", None)
            if check_size is not None:
                check_size(self.group_size)
        names = [reward.name for reward in rewards if reward.group_level]
        if self.ranks_per_group > 1 and names:
            raise ValueError(
                f"ranks_per_group={self.ranks_per_group} splits groups over ranks, but the "
                f"group-level rewards {', '.join(names)} need every group on one rank"
            )

    @property
    def members(self) -> int:
        """M, the number of a group's members on this rank."""
        return self.group_size // self.ranks_per_group

    @property
    def ranks_per_shard(self) -> int:
        """The number of ranks of a shard."""
        return self.ranks_per_group * self.ranks_per_sample

    @property
    def shards(self) -> int:
        """The number of shards."""
        return world_size() // self.ranks_per_shard

    @property
    def shard_index(self) -> int:
        """The number of this rank's shard."""
        return rank() // self.ranks_per_shard

    @property
    def first_member(self) -> int:
        """The number within its group of the first member that this rank holds."""
        member_set = rank() // self.ranks_per_sample % self.ranks_per_group
        return member_set * self.members

    def scored_groups(self, groups: int) -> range:
        """Return which of the shard's groups this rank decodes and scores.

        The ranks of a sample have the same videos, so that each group needs only one of them.
        """
        return range(rank() % self.ranks_per_sample, groups, self.ranks_per_sample)

    def place(self, value_B: Tensor, groups: int) -> Tensor:
        """Put values of the `scored_groups` among all ``groups`` -> (P, M), NaN elsewhere."""
        value_PM = value_B.new_full((groups, self.members), math.nan)
        value_PM[list(self.scored_groups(groups))] = value_B.view(-1, self.members)
        return value_PM

    def gather_groups(self, value_PM: Tensor) -> Tensor:
        """Gather (P, M) of every rank into (P * shards, G): whole groups, in the order of shards.

        The values of a group are those of the rank that scored it. All ranks must call this.
        """
        groups, members = value_PM.shape
        rows = gather_rows(value_PM)
        # S shards of R sets of D ranks
        rows_SRDPM = rows.view(
            self.shards,
            self.ranks_per_group,
            self.ranks_per_sample,
            groups,
            members,
        )
        # each group from the rank whose turn it was
        group_P = torch.arange(groups)
        rows_SRPM = rows_SRDPM[:, :, group_P % self.ranks_per_sample, group_P]
        # put the sets of a shard next to each other, group by group
        return rows_SRPM.transpose(1, 2).reshape(self.shards * groups, self.group_size)

    def local_part(self, value_PG: Tensor) -> Tensor:
        """Take this rank's (P, M) out of whole groups as `gather_groups` returns them."""
        groups = len(value_PG) // self.shards
        # the groups of this shard, then the members of this rank
        first_group = self.shard_index * groups
        rows_PG = value_PG[first_group : first_group + groups]
        return rows_PG[:, self.first_member : self.first_member + self.members]
