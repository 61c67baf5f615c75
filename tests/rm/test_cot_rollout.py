"""The generation of chains of thought in stage 2."""

from __future__ import annotations

from tests.rm.test_dual_rl import build, pairs

__all__ = ["pairs"]  # a fixture


def test_sampled_cots_do_not_depend_on_the_micro_batch(pairs):
    loop = build(pairs)
    together = loop.sample([0, 1, 2, 3], 0).cots
    assert len(together) == 8
    assert len({cot.ids for group in together for cot in group}) > 12
    alone = [group for row in range(4) for group in loop.sample([row], 0).cots]
    assert alone == together
