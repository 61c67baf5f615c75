"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from alignment.config import RewardConfig
from alignment.rewards import factory_of
from generator.config import GeneratorConfig


@dataclass(frozen=True)
class GeneratorEvaluation:
    """Sample by the plain ODE and let every reward judge. Prompt i is sampled from derive_seed(seed, "evaluate", i).

    adapter      folder of a trained adapter, null for the generator as it is; same seeds, so videos compare in pairs
    rewards      as in a training run; weights are ignored
    limit        use only the first prompts of the file
    batch        videos sampled, decoded and judged at once on each rank
    keep_videos  how many are written to videos/, the first ones
    resamples    of the bootstrap
    """

    out: str
    prompts: str
    generator: GeneratorConfig
    rewards: dict[str, RewardConfig]
    adapter: str | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 8
    scheduler: Literal["euler", "pipeline"] = "euler"
    keep_videos: int = 16
    crf: int = 12
    resamples: int = 10_000

    def __post_init__(self) -> None:
        problems = _positive(self, "batch", "limit", "resamples")
        if self.keep_videos < 0:
            problems.append(f"keep_videos must be at least 0, got {self.keep_videos}")
        if not 0 <= self.crf <= 51:
            problems.append(f"crf must be in 0..51, got {self.crf}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        _check("GeneratorEvaluation", problems)
        for name, reward in self.rewards.items():
            factory_of(name, reward)


@dataclass(frozen=True)
class RewardEvaluation:
    """Let a DeScore judge both videos of every pair, thinking first, and compare with what people preferred.

    pairs      a CSV, or a folder that holds one; its own chains of thought are not read
    layout     its columns, see `rm.benchmarks`: the training table, VideoGen-RewardBench, GenAI-Bench or in-domain
    dimension  of VideoGen-RewardBench: VQ, MQ, TA (DeScore's column) or Overall
    videos     folder of the benchmark's videos; null is the CSV's
    options    keyword arguments of `rm.scorer.DeScoreScorer.load`
    limit      use only the first pairs
    batch      pairs judged at once on each rank
    resamples  of the bootstrap over pairs
    """

    out: str
    checkpoint: str
    pairs: str
    layout: Literal["descore", "videogen", "genai", "indomain"] = "descore"
    dimension: Literal["VQ", "MQ", "TA", "Overall"] = "TA"
    videos: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    batch: int = 4
    resamples: int = 2_000

    def __post_init__(self) -> None:
        _check("RewardEvaluation", _positive(self, "batch", "limit", "resamples"))


def _positive(cfg: Any, *names: str) -> list[str]:
    values = {name: getattr(cfg, name) for name in names}
    return [
        f"{name} must be at least 1, got {value}"
        for name, value in values.items()
        if value is not None and value < 1
    ]


def _check(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


@dataclass(frozen=True)
class ScoreRun:
    """Which rewards judge, and how.

    rewards     as in a training run; weights are ignored
    batch       videos read and judged at once; of those, the ones of one size and rate share a forward
    max_frames  a longer video is judged on this many of its frames, evenly spaced
    """

    rewards: dict[str, RewardConfig]
    batch: int = 8
    max_frames: int = 512

    def __post_init__(self) -> None:
        problems = [
            f"{n} must be at least 1, got {getattr(self, n)}"
            for n in ("batch",)
            if getattr(self, n) < 1
        ]
        if self.max_frames < 2:
            problems.append(f"max_frames must be at least 2, got {self.max_frames}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        if problems:
            raise ValueError("; ".join(f"ScoreRun.{problem}" for problem in problems))
        for name, reward in self.rewards.items():
            factory_of(name, reward)
