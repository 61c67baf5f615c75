"""Advantages of two processes whose rewards have other parts, for `test_advantages.py`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from alignment.advantages import Advantages, group_relative_advantages
from alignment.config import GrpoConfig
from alignment.rank_groups import RankGroups
from common import distributed
from common.types import Score

# One group of two videos on each rank.
RED = {"red": torch.tensor([1.0, 2.0])}
BLUE = {"blue": torch.tensor([30.0, 50.0])}
MORE_RED = {"red": torch.tensor([3.0, 6.0])}


def scores(case: str, rank: int) -> dict[str, Score]:
    """The scores of a case on a rank; ``plain`` is a reward without parts."""
    value = torch.tensor([0.0, 2.0]) if rank == 0 else torch.tensor([4.0, 4.0])
    failed = Score(torch.full((2,), math.nan))
    parts = RED | BLUE if rank == 0 else BLUE | MORE_RED
    whole = Score(value, parts)
    plain = Score(value)
    if case == "other order":
        # many names, so that two orders of a set agree by chance in one of 720 runs only
        more = {name: torch.full((2,), float(ord(name))) for name in "abcd"}
        order = parts | more if rank == 0 else more | parts
        return {"mine": Score(value, order), "plain": plain}
    if case == "some parts":
        some = Score(value, RED if rank == 0 else BLUE)
        return {"mine": some, "plain": plain}
    if case == "failed":
        return {"mine": whole if rank == 0 else failed, "plain": plain}
    # Nothing follows the reward that failed.
    return {"plain": plain, "mine": failed if rank == 0 else whole}


def report(found: Advantages) -> dict[str, object]:
    return {
        "advantages": found.advantage_PM.tolist(),
        "means": found.means,
        "details": found.details,
    }


def main(folder: Path) -> None:
    distributed.init_process_group(timeout_s=30, for_deepspeed=False)
    me = distributed.rank()
    cfg = GrpoConfig(group_size=2, scale="none")
    ranks = RankGroups(2, 1)
    found = {}
    for case in ("other order", "some parts", "failed", "failed last"):
        mine = group_relative_advantages(
            scores(case, me), {"mine": 1.0, "plain": 1.0}, cfg, ranks, groups=1
        )
        found[case] = report(mine)
    distributed.shutdown()
    (folder / f"rank{me}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
