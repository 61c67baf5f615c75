"""Schemas of launch/evaluate.py and launch/score.py. No torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from common.schema import NonNegativeInt, PositiveInt, config
from generator.config import GeneratorConfig, check_one_rank_per_video
from launch.schemas.pairs import RewardDimensionName
from launch.schemas.rewards import ScoringRewards
from launch.schemas.training import (
    Crf,
    Scheduler,
    TableLayout,
    check_own_columns,
)
from rm.scorer_options import check_thinking


@config
class GeneratorEvaluation:
    """Scores of a generator's videos by every reward, sampled without noise.

    Prompt i is sampled from derive_seed(seed, "evaluate", i).

    adapter      folder of a trained adapter; null samples the generator without. Seeds are
                 the same, so that videos can be compared pair by pair.
    rewards      as in a training run; weights are ignored.
    limit        use only the first prompts of the file.
    batch        videos sampled, decoded and scored together on each rank.
    keep_videos  how many of the first videos are written to videos/.
    resamples    of the bootstrap.
    """

    out: str
    prompts: str
    generator: GeneratorConfig
    rewards: ScoringRewards
    adapter: str | None = None
    limit: PositiveInt | None = None
    seed: int = 0
    batch: PositiveInt = 8
    scheduler: Scheduler = "euler"
    keep_videos: NonNegativeInt = 16
    crf: Crf = 12
    resamples: PositiveInt = 10_000

    def __post_init__(self) -> None:
        check_one_rank_per_video(self.generator)


@config
class RewardEvaluation:
    """Accuracy of a DeScore on pairs that people compared; it writes CoTs of its own.

    pairs      a CSV, or a folder that holds a single CSV; its chains of thought are not read.
    layout     its columns, see `rm.benchmarks`: the training table, VideoGen-RewardBench,
               GenAI-Bench or in-domain.
    columns    own names of its columns, see `data.columns` of a cold start.
    dimension  of VideoGen-RewardBench: VQ, MQ, TA (DeScore's column) or Overall.
    videos     folder of the benchmark's videos; null is the folder of the CSV.
    options    keyword arguments of `rm.adaptive.load_scorer`.
    limit      use only the first pairs.
    batch      pairs scored together on each rank.
    resamples  of the bootstrap over pairs.
    """

    out: str
    checkpoint: str
    pairs: str
    layout: TableLayout = "descore"
    columns: dict[str, str] = field(default_factory=dict)
    dimension: RewardDimensionName = "TA"
    videos: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limit: PositiveInt | None = None
    seed: int = 0
    batch: PositiveInt = 4
    resamples: PositiveInt = 2_000

    def __post_init__(self) -> None:
        check_own_columns(self.columns, self.layout)
        try:
            check_thinking(self.options)
        except ValueError as error:
            raise ValueError(f"options: {error}") from error


@config
class ScoreRun:
    """Scores of existing video files.

    rewards     as in a training run; weights are ignored.
    batch       videos read and scored together; those of one size and rate share a forward.
    max_frames  a longer video is scored on so many evenly spaced frames.
    """

    rewards: ScoringRewards
    batch: PositiveInt = 8
    max_frames: Annotated[int, Field(ge=2)] = 512
