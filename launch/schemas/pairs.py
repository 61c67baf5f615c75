"""What making pairs and training on them are: the schemas of launch/pairs.py and launch/dpo.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from alignment.config import DpoConfig, PairConfig, RewardConfig
from common.config import WandbConfig, check, not_negative
from engine.config import ZERO_STAGES, EmaConfig, OptimizerConfig
from generator.config import GeneratorConfig
from launch.schemas.training import check_rewards


@dataclass(frozen=True)
class PairTableConfig:
    """Pairs that exist: a CSV of mp4 files with people's labels; ties are left out.

    layout, dimension, videos  as in `rm.benchmarks.read_benchmark`
    """

    csv: str
    layout: Literal["descore", "videogen", "genai", "indomain"] = "descore"
    dimension: Literal["VQ", "MQ", "TA", "Overall"] = "Overall"
    videos: str | None = None


@dataclass(frozen=True)
class PairsRun:
    """Pairs for `DpoRun`: made by the generator and judged by rewards, or read from a table.

    prompts     as in `GrpoRun`; the generator makes pairs.candidates videos for each, without noise on the way
    table       or videos that exist, which are cut to the generator's size, frames and rate
    rewards     of generated videos; weights count as in training, weight 0 only watches
    adapter     folder of what was trained; null for the generator as it is
    limit       use only the first prompts, or rows
    per_shard   pairs in one file
    latent_dtype dtype of the latents on disk
    keep_candidates  keep candidates/, all videos' latents, when the pairs are written
    """

    out: str
    generator: GeneratorConfig
    prompts: str | None = None
    table: PairTableConfig | None = None
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    pairs: PairConfig = field(default_factory=PairConfig)
    adapter: str | None = None
    seed: int = 0
    limit: int | None = None
    per_shard: int = 64
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    keep_candidates: bool = False

    def __post_init__(self) -> None:
        problems = []
        if (self.prompts is None) == (self.table is None):
            problems.append(
                "prompts or table must say where pairs come from, one of them"
            )
        if self.prompts is not None:
            problems += _nobody_judges(self.rewards)
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit must be at least 1 or null, got {self.limit}")
        if self.per_shard < 1:
            problems.append(f"per_shard must be at least 1, got {self.per_shard}")
        check("PairsRun", problems)
        check_rewards(self.rewards)


@dataclass(frozen=True)
class RefreshConfig:
    """Online pairs: every so many steps the policy makes new ones, which replace those before.

    prompts, rewards, pairs, limit  as in `PairsRun`; each round takes the next ``limit`` prompts
    """

    every: int
    prompts: str
    rewards: dict[str, RewardConfig]
    pairs: PairConfig = field(default_factory=PairConfig)
    limit: int = 64

    def __post_init__(self) -> None:
        problems = [
            f"{n} must be at least 1, got {getattr(self, n)}"
            for n in ("every", "limit")
            if getattr(self, n) < 1
        ]
        problems += _nobody_judges(self.rewards)
        check("RefreshConfig", problems)
        check_rewards(self.rewards)


@dataclass(frozen=True)
class DpoRun:
    """Flow-DPO, Flow-RWR or plain fine-tuning on what `launch/pairs.py` wrote.

    pairs, heldout   folders of pairs; heldout null measures nothing on the way
    eval_every       steps between two measurements on the first ``heldout_pairs``; 0 measures at the end only
    refresh          online pairs; null trains on ``pairs`` alone, and then VAE and text encoder are never loaded
    ema, zero_stage, deepspeed, save_every, keep, watchdog_s, max_nonfinite_updates  as in `GrpoRun`
    """

    run_dir: str
    pairs: str
    generator: GeneratorConfig
    heldout: str | None = None
    dpo: DpoConfig = field(default_factory=DpoConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    refresh: RefreshConfig | None = None
    seed: int = 0
    zero_stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)
    ema: EmaConfig | None = None
    eval_every: int = 0
    heldout_pairs: int = 64
    save_every: int = 100
    keep: int = 2
    watchdog_s: float = 7200.0
    max_nonfinite_updates: int = 5
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        positive = ("heldout_pairs", "save_every", "keep")
        problems = [
            f"{n} must be at least 1, got {getattr(self, n)}"
            for n in positive
            if getattr(self, n) < 1
        ]
        problems += not_negative(
            self, "eval_every", "watchdog_s", "max_nonfinite_updates"
        )
        if self.zero_stage not in ZERO_STAGES:
            problems.append(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.refresh is not None and self.zero_stage == 3:
            problems.append(
                "zero_stage=3 does not go with refresh: ranks make unequal numbers of videos"
            )
        check("DpoRun", problems)


def _nobody_judges(rewards: dict[str, RewardConfig]) -> list[str]:
    if any(reward.weight != 0 for reward in rewards.values()):
        return []
    return [
        "rewards need one weight that is not 0, else nothing says which video is better"
    ]
