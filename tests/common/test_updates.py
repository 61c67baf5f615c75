"""The share of an optimizer step that a rank computes."""

from __future__ import annotations

import pytest

import common.updates
from common.updates import backwards_on_rank, rank_micro_batches


@pytest.fixture
def three_ranks(monkeypatch) -> None:
    monkeypatch.setattr(common.updates, "world_size", lambda: 3)
    monkeypatch.setattr(common.updates, "rank", lambda: 1)


def test_backwards_on_rank_divide_the_pairs(three_ranks) -> None:
    assert backwards_on_rank("pairs_per_step", 12, 2) == 2
    with pytest.raises(ValueError, match="pairs_per_step=12"):
        backwards_on_rank("pairs_per_step", 12, 8)


def test_rank_micro_batches_are_the_rank_s_share(three_ranks) -> None:
    assert rank_micro_batches(range(12), 2) == [range(4, 6), range(6, 8)]
