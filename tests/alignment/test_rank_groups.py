"""Where the members of a group are, and which rank scores them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alignment import rank_groups
from alignment.rank_groups import RankGroups


class Ranks:
    """Several ranks, of which one at a time is this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int = 8) -> None:
        self.now = 0
        self.world = world
        self.rows: list[Tensor] = []
        monkeypatch.setattr(rank_groups, "rank", lambda: self.now)
        monkeypatch.setattr(rank_groups, "world_size", lambda: self.world)
        monkeypatch.setattr(rank_groups, "gather_rows", lambda _: torch.cat(self.rows))

    def each(self) -> Iterator[int]:
        for number in range(self.world):
            self.now = number
            yield number


def test_consecutive_ranks_share_tokens_then_members_then_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch)
    groups = RankGroups(group_size=6, ranks_per_group=2, ranks_per_sample=2)
    layout = []
    for _ in ranks.each():
        layout.append((groups.shard_index, groups.first_member))
    assert groups.shards == 2
    assert layout == [(0, 0), (0, 0), (0, 3), (0, 3), (1, 0), (1, 0), (1, 3), (1, 3)]


def test_ranks_of_a_sample_take_turns_in_scoring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch, world=4)
    groups = RankGroups(group_size=2, ranks_per_group=1, ranks_per_sample=2)
    turns = []
    for _ in ranks.each():
        turns.append(list(groups.scored_groups(3)))
    assert turns == [[0, 2], [1], [0, 2], [1]]


def test_gathered_groups_hold_the_score_of_the_rank_that_scored_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch)
    groups = RankGroups(group_size=4, ranks_per_group=2, ranks_per_sample=2)
    # A score tells its shard, group and member: 100 s + 10 p + m, of 3 groups a shard.
    for _ in ranks.each():
        scores = []
        for group in groups.scored_groups(3):
            first = 100 * groups.shard_index + 10 * group + groups.first_member
            scores += [float(first), float(first + 1)]
        ranks.rows.append(groups.place(torch.tensor(scores), 3))
    whole = groups.gather_groups(ranks.rows[0])
    starts = torch.tensor([0.0, 10, 20, 100, 110, 120])
    assert torch.equal(whole, starts[:, None] + torch.arange(4))

    # Every rank finds its members, whoever scored them.
    ranks.now = 7
    assert groups.local_part(whole).tolist() == [[102, 103], [112, 113], [122, 123]]


def test_more_ranks_to_a_sample_than_groups_leaves_ranks_without_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch, world=4)
    groups = RankGroups(group_size=2, ranks_per_group=1, ranks_per_sample=4)
    for _ in ranks.each():
        scored = groups.scored_groups(1)
        ranks.rows.append(groups.place(torch.tensor([5.0, 6.0] * len(scored)), 1))
    assert groups.gather_groups(ranks.rows[0]).tolist() == [[5.0, 6.0]]
    assert ranks.rows[3].isnan().all()
