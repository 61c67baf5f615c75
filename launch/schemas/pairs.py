"""Schemas of launch/pairs.py, which makes pairs, and launch/dpo.py. No torch."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from alignment.config import DpoConfig, PairConfig
from common.schema import NonNegativeInt, PositiveInt, config, run_config
from engine.config import EmaConfig, OptimizerConfig, TrainingRun
from generator.config import (
    GeneratorConfig,
    check_one_rank_per_video,
    check_vae_decodes,
    check_wan,
    check_zero_stage,
)
from launch.schemas.rewards import Rewards, TrainingRewards, check_some_weight
from launch.schemas.training import TableLayout, check_own_columns

RewardDimensionName = Literal["VQ", "MQ", "TA", "Overall"]


@config
class PairTableConfig:
    """A table of existing pairs: a CSV of mp4 files with people's labels.

    Ties are left out. The keys are those of `rm.benchmarks.read_benchmark`.
    """

    csv: str
    layout: TableLayout = "descore"
    columns: dict[str, str] = field(default_factory=dict)
    dimension: RewardDimensionName = "Overall"
    videos: str | None = None

    def __post_init__(self) -> None:
        check_own_columns(self.columns, self.layout)


@config
class PairsRun:
    """Pairs for `DpoRun`: sampled and scored, or read from a table.

    prompts           as in `GrpoRun`; the generator samples pairs.candidates videos for
                      each, without noise on the way.
    table             or existing videos, which are cut to the generator's size, number of
                      frames and rate.
    rewards           of sampled videos; weights count as in training.
    adapter           folder of a trained adapter; null samples the generator without.
    limit             use only the first prompts, or rows.
    per_shard         pairs in a file.
    latent_dtype      dtype of the latents on disk.
    keep_candidates   keep the latents of all videos in candidates/ after the pairs are
                      written.
    """

    out: str
    generator: GeneratorConfig
    prompts: str | None = None
    table: PairTableConfig | None = None
    rewards: Rewards = field(default_factory=dict)
    pairs: PairConfig = field(default_factory=PairConfig)
    adapter: str | None = None
    seed: int = 0
    limit: PositiveInt | None = None
    per_shard: PositiveInt = 64
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    keep_candidates: bool = False

    def __post_init__(self) -> None:
        check_wan(self.generator, "a set of pairs")
        check_vae_decodes(self.generator, "a set of pairs")
        check_one_rank_per_video(self.generator)
        if (self.prompts is None) == (self.table is None):
            raise ValueError(
                "set prompts or table, and not both: pairs come from one of them"
            )
        if self.prompts is not None:
            check_some_weight(self.rewards)


@config
class RefreshConfig:
    """Online pairs: every few steps the policy makes new pairs, which replace the old.

    prompts, rewards and pairs are as in `PairsRun`; each round takes the next ``limit``
    prompts.
    """

    every: PositiveInt
    prompts: str
    rewards: TrainingRewards
    pairs: PairConfig = field(default_factory=PairConfig)
    limit: PositiveInt = 64


def _flow_dpo_optimizer() -> OptimizerConfig:
    return OptimizerConfig(lr=5e-6)


@run_config
class DpoRun(TrainingRun):
    """Flow-DPO, Flow-RWR or supervised fine-tuning on what `launch/pairs.py` wrote.

    pairs          folder of the training pairs.
    heldout        folder of held-out pairs; null evaluates nothing.
    eval_every     steps between two evaluations on the first ``heldout_pairs``; 0 evaluates
                   at the end only.
    refresh        online pairs; null trains on ``pairs`` alone and never loads the VAE or
                   the prompt encoder.
    ema            as in `GrpoRun`.
    """

    pairs: str
    generator: GeneratorConfig
    heldout: str | None = None
    dpo: DpoConfig = field(default_factory=DpoConfig)
    optimizer: OptimizerConfig = field(default_factory=_flow_dpo_optimizer)
    refresh: RefreshConfig | None = None
    ema: EmaConfig | None = None
    eval_every: NonNegativeInt = 0
    heldout_pairs: PositiveInt = 64
    save_every: PositiveInt = 100

    def __post_init__(self) -> None:
        check_wan(self.generator, "training on stored pairs")
        check_vae_decodes(self.generator, "training on stored pairs")
        check_zero_stage(self.generator, self.zero_stage)
        if self.refresh is not None:
            # the ranks share the videos of new pairs
            check_one_rank_per_video(self.generator)
        if self.refresh is not None and self.zero_stage == 3:
            raise ValueError(
                "zero_stage=3 excludes refresh: ranks make unequal numbers of videos"
            )
