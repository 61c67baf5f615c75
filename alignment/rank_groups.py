"""Share the members of a group between ranks, and gather whole groups from all ranks.

M is the number of a group's members on one rank: G with ``ranks_per_group`` of 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.distributed import gather_rows, rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.rewards.errors import NamedReward


@dataclass(frozen=True)
class RankGroups:
    """The layout of groups over ranks: ``ranks_per_group`` consecutive ranks form a shard.

    Each shard gets its part of a step's prompts. Every rank of a shard holds M members of
    every group of the shard.
    """

    group_size: int
    ranks_per_group: int

    def check(self, rewards: Iterable[NamedReward]) -> None:
        """Raise ValueError for rewards that compare members which several ranks share."""
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
    def shards(self) -> int:
        """The number of shards."""
        return world_size() // self.ranks_per_group

    @property
    def shard_index(self) -> int:
        """The number of this rank's shard."""
        return rank() // self.ranks_per_group

    @property
    def first_member(self) -> int:
        """The number within its group of the first member that this rank holds."""
        return rank() % self.ranks_per_group * self.members

    def gather_groups(self, value_PM: Tensor) -> Tensor:
        """Gather (P, M) of every rank into (P * shards, G): whole groups, in the order of shards.

        All ranks must call this.
        """
        groups, members = value_PM.shape
        rows = gather_rows(value_PM)
        # S shards of R ranks: put the ranks of a shard next to each other, group by group
        rows_SRPM = rows.view(self.shards, self.ranks_per_group, groups, members)
        return rows_SRPM.transpose(1, 2).reshape(self.shards * groups, self.group_size)

    def local_part(self, value_PG: Tensor) -> Tensor:
        """Take this rank's (P, M) out of whole groups as `gather_groups` returns them."""
        groups = len(value_PG) // self.shards
        # the groups of this shard, then the members of this rank
        first_group = self.shard_index * groups
        rows_PG = value_PG[first_group : first_group + groups]
        return rows_PG[:, self.first_member : self.first_member + self.members]
