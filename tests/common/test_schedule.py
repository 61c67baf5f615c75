from __future__ import annotations

import random

from common.distributed import derive_seed
from common.schedule import IndexSchedule, describe_draws
from rm.data import PairSchedule


def test_epoch_order_depends_on_seed_and_name() -> None:
    """Written out: three steps of four from ten things reach into the second epoch."""
    orders = []
    for epoch in (0, 1):
        order = list(range(10))
        random.Random(derive_seed(3, "pairs", epoch)).shuffle(order)
        orders += order
    schedule = IndexSchedule(10, seed=3, per_step=4, name="pairs")
    assert [i for step in range(3) for i in schedule.at(step)] == orders[:12]
    assert schedule.at(1) == tuple(orders[4:8])  # and back again
    draws = [
        draw
        for step in range(3)
        for draw in PairSchedule(10, pairs_per_step=4, seed=3).at(step)
    ]
    assert [(draw.row, draw.epoch) for draw in draws] == [
        (row, i // 10) for i, row in enumerate(orders[:12])
    ]


def test_epoch_order_differs_by_name_and_seed() -> None:
    def order(seed: int, name: str) -> tuple[int, ...]:
        return IndexSchedule(20, seed=seed, per_step=20, name=name).at(0)

    assert len({order(0, "a"), order(0, "b"), order(1, "a")}) == 3


def test_uneven_draws_are_described_with_their_numbers() -> None:
    """Six pairs, 32 a step: 3 epochs are 18 draws, and a step makes 32 = 5.333 epochs."""
    text = describe_draws(6, per_step=32, steps=1, epochs=3)
    for number in ("18 draws", "32 draws", "5.333 epochs", "6 times"):
        assert number in text
    assert describe_draws(10, per_step=4, steps=5, epochs=2) == ""
    assert "2.4 epochs" in describe_draws(10, per_step=4, steps=6, epochs=2.5)
    # a number of steps is never uneven
    assert describe_draws(10, per_step=4, steps=3) == ""
    assert "2 times" in describe_draws(3, per_step=4, steps=3)
