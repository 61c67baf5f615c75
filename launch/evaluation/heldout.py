"""The same held-out prompts and seeds again and again while a run trains: does the generator get better?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.distributed import (
    derive_seed,
    gather_objects,
    is_main,
    own_batches,
    raise_on_all,
)
from common.types import RewardUnavailableError
from launch.evaluation.results_table import score_fields
from launch.evaluation.samples import SampleWriter

if TYPE_CHECKING:
    from common.types import RewardModel
    from generator.wan import WanGenerator
    from launch.evaluation.results_table import Row

BATCH = 8  # where the generator sets no limit of its own
SCHEDULERS = {"eval": "euler", "eval_stock": "pipeline"}


def measure(
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    prompts: Sequence[str],
    *,
    seed: int,
    stock: bool,
    folder: Path,
    videos: int,
) -> dict[str, float]:
    """MEAN of every reward and its parts over the prompts, ``eval/<reward>``; what could not be judged does not count.

    Sampled along the grid of training, and with ``stock`` once more by the stock pipeline's scheduler, which people
    will sample with: ``eval_stock/<reward>``. Prompt i always has the noise of derive_seed(seed, "evaluate", i), as in
    launch/evaluate.py. The first ``videos`` of the grid's go to ``folder``. Ranks share the prompts; all call it.
    """
    metrics = {}
    for prefix in SCHEDULERS if stock else ("eval",):
        rows = _rows(
            generator,
            rewards,
            prompts,
            seed=seed,
            prefix=prefix,
            folder=folder,
            videos=videos,
        )
        for column in dict.fromkeys(name for row in rows for name in row):
            judged = [row[column] for row in rows if row.get(column) is not None]
            metrics[f"{prefix}/{column}"] = (
                math.fsum(judged) / len(judged) if judged else math.nan
            )
    return metrics


def _rows(
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    prompts: Sequence[str],
    *,
    seed: int,
    prefix: str,
    folder: Path,
    videos: int,
) -> list[Row]:
    """{reward or reward.part: value} of all prompts, in order."""
    found: dict[int, Row] = {}
    problem: RewardUnavailableError | None = None
    writer = (
        SampleWriter(folder, fps=generator.cfg.fps)
        if prefix == "eval" and videos and is_main()
        else None
    )
    for own in own_batches(len(prompts), generator.portions.size or BATCH):
        part = (
            own or [0] * generator.sharded
        )  # a sharded module is called by all ranks or by none
        if not part:
            continue
        texts, seeds = (
            [prompts[i] for i in part],
            [derive_seed(seed, "evaluate", i) for i in part],
        )
        clean = generator.sample(texts, seeds, scheduler=SCHEDULERS[prefix])
        if not own:
            continue
        video_BTYXC = generator.decode(clean)
        try:
            scores = {
                name: one.score(video_BTYXC, texts, fps=generator.cfg.fps)
                for name, one in rewards.items()
            }
        except RewardUnavailableError as error:
            problem = (
                error  # and go on sampling: other ranks may be waiting for this one
            )
            continue
        rows = [
            {"prompt": texts[b], "seed": seeds[b]} | score_fields(scores, b)
            for b in range(len(own))
        ]
        found |= dict(zip(own, map(_columns, rows), strict=True))
        if writer is not None and (room := videos - writer.count) > 0:
            writer.add(video_BTYXC[:room], rows[:room])
    raise_on_all(problem)
    everything = {i: row for one in gather_objects(found) for i, row in one.items()}
    return [everything[i] for i in sorted(everything)]


def _columns(row: Row) -> Row:
    parts = {
        f"{name}.{part}": value
        for name, found in row["parts"].items()
        for part, value in found.items()
    }
    return {**row["rewards"], **parts}
