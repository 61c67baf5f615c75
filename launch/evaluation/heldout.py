"""Measure a generator on held-out prompts while a run trains, always with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.distributed import (
    DataRanks,
    derive_seed,
    gather_objects,
    is_main,
    raise_on_all,
)
from common.types import Prompt, RewardUnavailableError, text_of
from launch.evaluation.generator import columns, flatten_scores
from launch.evaluation.results_table import score_fields
from launch.evaluation.samples import SampleWriter

if TYPE_CHECKING:
    from common.types import RewardModel
    from generator.wan import WanGenerator
    from launch.evaluation.results_table import Row

# Videos per batch where the generator sets no limit.
BATCH = 8
# Prompts whose noise shows how far the jumps of a flow map disagree.
GAP_PROMPTS = 8


@dataclass(frozen=True)
class HeldoutSet:
    """The prompts of a measurement and the models that it needs."""

    generator: WanGenerator
    rewards: Mapping[str, RewardModel]
    prompts: Sequence[Prompt]
    seed: int


def score_heldout(
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    stock: bool,
    folder: Path,
    videos: int,
    steps: Sequence[int] = (),
    usual_guidance: float | None = None,
) -> dict[str, list[Row]]:
    """{reward or reward.part: value} of every prompt, in order, on every rank.

    The rows of ``eval`` are sampled along the grid of training; with ``stock``, those of
    ``eval_stock`` by the stock pipeline's scheduler, which users sample with; for each N of
    ``steps``, those of ``eval_N`` in N steps, jumps for a flow map; with ``usual_guidance``,
    those of ``eval_usual`` along the grid of training at that guidance. Prompt i always has
    the noise of derive_seed(seed, "evaluate", i), as in launch/evaluate.py. The first ``videos`` of
    the training grid go to ``folder``. Ranks share the prompts, and all of them call this function.
    """
    heldout = HeldoutSet(generator, rewards, prompts, seed)
    # Samples are for looking at: the main rank's are enough.
    writer = None
    if videos and is_main():
        writer = SampleWriter(folder, fps=generator.cfg.fps)
    rows = {"eval": _score_prompts(heldout, "euler", writer, videos)}
    if stock:
        rows["eval_stock"] = _score_prompts(heldout, "pipeline", None, 0)
    for number in steps:
        rows[f"eval_{number}"] = _score_prompts(
            heldout, "euler", None, 0, num_steps=number
        )
    if usual_guidance is not None:
        rows["eval_usual"] = _score_prompts(
            heldout, "euler", None, 0, guidance_scale=usual_guidance
        )
    return rows


def means_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """MEAN of every reward and its parts over the prompts; values that are missing do not count.

    ``eval/<reward>`` and ``eval_stock/<reward>``, of the rows of `score_heldout`.
    """
    # A column is a reward or a part of it.
    metrics = {}
    for prefix, flat_rows in rows.items():
        for column, values in columns(flat_rows).items():
            # Videos that could not be scored do not count.
            scored = [value for value in values if value is not None]
            mean = math.fsum(scored) / len(scored) if scored else math.nan
            metrics[f"{prefix}/{column}"] = mean
    return metrics


def gap_of_map(
    generator: WanGenerator, prompts: Sequence[Prompt], *, seed: int
) -> dict[str, float]:
    """``eval/map_gap``, how far the jumps of a flow map disagree; nothing for other generators.

    Every rank measures the same first prompts, with the noise of `score_heldout`.
    """
    if not getattr(generator, "flow_map", False):
        return {}
    some = prompts[:GAP_PROMPTS]
    seeds = [derive_seed(seed, "evaluate", i) for i in range(len(some))]
    return {"eval/map_gap": generator.map_gap(some, seeds)}


def _score_prompts(
    heldout: HeldoutSet,
    scheduler: str,
    writer: SampleWriter | None,
    videos: int,
    **options: float,
) -> list[Row]:
    """{reward or reward.part: value} of all prompts, in order, on every rank.

    ``options`` are of the generator's ``sample``; one of another class may not know them.
    """
    generator = heldout.generator
    rows: dict[int, Row] = {}
    problem: RewardUnavailableError | None = None
    ranks = DataRanks(generator.cfg.context_parallel)
    # A generator of another class than Wan has no portions.
    size = None
    if generator.cfg.target is None:
        size = generator.portions.size
    batches = ranks.batches(len(heldout.prompts), size or BATCH)
    for number, places in enumerate(batches):
        # A sharded module must run on all ranks or on none: without prompts, repeat the first.
        batch = places
        if not batch and generator.sharded:
            batch = [0]
        if not batch:
            continue
        prompts = [heldout.prompts[i] for i in batch]
        seeds = [derive_seed(heldout.seed, "evaluate", i) for i in batch]
        clean = generator.sample(prompts, seeds, scheduler=scheduler, **options)
        # Ranks that have sampled the same videos take turns in scoring them.
        if not places or number % ranks.ranks_per_sample != ranks.place:
            continue

        # After a failed reward the sampling continues, because other ranks may be waiting.
        video_BTYXC = generator.decode(clean)
        texts = [text_of(prompt) for prompt in prompts]
        try:
            scores = {}
            for name, reward in heldout.rewards.items():
                scores[name] = reward.score(video_BTYXC, texts, fps=generator.cfg.fps)
        except RewardUnavailableError as error:
            problem = error
            continue

        # Write the first videos, and remember the scores by the prompt's index.
        described = []
        for b, i in enumerate(places):
            fields = score_fields(scores, b)
            rows[i] = flatten_scores(fields)
            described.append({"prompt": texts[b], "seed": seeds[b], **fields})
        if writer is not None and writer.count < videos:
            room = videos - writer.count
            writer.add(video_BTYXC[:room], described[:room])
    raise_on_all(problem)

    # The rows of all ranks, in the order of the prompts.
    everything: dict[int, Row] = {}
    for part in gather_objects(rows):
        everything |= part
    return [everything[i] for i in sorted(everything)]
