"""What a run is: the schemas behind the yaml files in configs/. No torch, so a typo is an error within two seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from alignment.config import GrpoConfig, RewardConfig
from alignment.rewards import factory_of
from common.config import WandbConfig, check, not_negative
from engine.config import ZERO_STAGES, EmaConfig, OptimizerConfig
from generator.config import GeneratorConfig
from rm.config import (
    BackboneLora,
    ColdStartConfig,
    CotBackendConfig,
    DualRlConfig,
    Generation,
    LearningRates,
    RewardDimension,
    VideoSettings,
    one_reward,
)
from rm.text_rewards import RuleRewardConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured while a run trains: before the first step, every so many, and after the last.

    prompts  as in `GrpoRun`, none that are trained on
    every    steps between two measurements
    limit    use only the first prompts of the file; null uses all
    stock_scheduler    sample by the stock pipeline's scheduler as well, which is not the one that is trained along
    videos   how many of the first prompts' videos are kept each time
    """

    prompts: str
    every: int = 50
    limit: int | None = 32
    stock_scheduler: bool = False
    videos: int = 4

    def __post_init__(self) -> None:
        problems = [
            f"{n} must be at least 1, got {value}"
            for n, value in (("every", self.every), ("limit", self.limit))
            if value is not None and value < 1
        ]
        if self.videos < 0:
            problems.append(f"videos must be at least 0, got {self.videos}")
        check("EvaluationConfig", problems)


@dataclass(frozen=True)
class GrpoRun:
    """Longcat-GRPO. Where a run goes on is a matter of ``--resume``, not of this.

    prompts           a .txt file, one prompt a line, or a .jsonl file with {"prompt": ...} lines
    prompts_per_step  groups of one optimizer step, over ALL ranks; the number of ranks must divide it, or with
                      grpo.ranks_per_group the number of sets of ranks
    rewards           name -> reward; weight 0 is a judge that is watched and never trained on
    evaluation        held-out prompts, sampled again and again without noise; null for none
    ema               average of the weights: evaluated instead of them, and exported beside them; null for none
    cache_prompts     encode all prompts that this rank will see first, then drop the text encoder from memory
    zero_stage        DeepSpeed ZeRO: 0 none, 1 splits optimizer state over ranks, 2 gradients too, 3 weights too (the
                      rewards' models stay whole on every rank)
    deepspeed         keys of DeepSpeed's own JSON, over what `engine.deepspeed.ds_config` computes
    save_every, keep  steps between checkpoints, and how many stay; the last step is always saved
    watchdog_s       a run without a finished step for so long is stuck, says where and ends; 0 for never
    max_nonfinite_updates   so many updates in a row may have a gradient that is not finite: they are not made
    video_every      steps between sample videos, 0 for none; they are that step's own rollouts
    video_groups     how many of rank 0's groups are written then
    tensorboard      metrics as TensorBoard's files too, if that package is there
    self_checks      look at the generator and the rewards before training, see `alignment.self_checks`
    """

    run_dir: str
    prompts: str
    generator: GeneratorConfig
    rewards: dict[str, RewardConfig]
    steps: int = 500
    prompts_per_step: int = 64
    seed: int = 0
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero_stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)
    save_every: int = 50
    keep: int = 2
    watchdog_s: float = 7200.0
    max_nonfinite_updates: int = 5
    video_every: int = 10
    video_groups: int = 2
    self_checks: bool = True
    evaluation: EvaluationConfig | None = None
    ema: EmaConfig | None = None
    cache_prompts: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        positive = ("steps", "prompts_per_step", "save_every", "keep", "video_groups")
        problems = [
            f"{n} must be at least 1, got {getattr(self, n)}"
            for n in positive
            if getattr(self, n) < 1
        ]
        problems += not_negative(
            self, "video_every", "watchdog_s", "max_nonfinite_updates"
        )
        if self.zero_stage not in ZERO_STAGES:
            problems.append(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.zero_stage == 3 and self.generator.sampler.tail_cache > 1:
            problems.append(
                "zero_stage 3 needs generator.sampler.tail_cache=1: all ranks must run the same blocks"
            )
        if self.generator.sampler.noise_level == 0:
            problems.append(
                "generator.sampler.noise_level must be positive: without noise the members are all one, got 0"
            )
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        elif all(reward.weight == 0 for reward in self.rewards.values()):
            problems.append(
                "rewards need one weight that is not 0, else nothing is learned"
            )
        check("GrpoRun", problems)
        check_rewards(self.rewards)


@dataclass(frozen=True)
class PairFiles:
    """CSV files (or folders that hold one) with the official columns.

    heldout  null measures nothing on the way
    limit    train on the first pairs only
    layout   of both files, see `rm.benchmarks`. Others than "descore" hold no chains of thought and no right scores:
             they are for a discriminative reward model
    videos   folder of their videos; null is the CSV's own
    check_videos  decode every video to train on beforehand, beside the run, see `rm.video_check`; pairs that have a bad
             one are left out and listed in run_dir/bad_samples.jsonl
    max_bad_share  share of the pairs that may be left out; more and the run does not start
    """

    train: str
    heldout: str | None = None
    limit: int | None = None
    layout: Literal["descore", "videogen", "genai", "indomain"] = "descore"
    videos: str | None = None
    check_videos: bool = True
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                f"data.max_bad_share must lie in [0, 1], got {self.max_bad_share}"
            )
        if self.videos is not None and self.layout == "descore":
            raise ValueError(
                f"data.videos={self.videos!r}: the descore layout names its videos relative to the CSV"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit must be at least 1 or null, got {self.limit}")


@dataclass(frozen=True)
class ColdStartRun:
    """DeScore's first stage on a Qwen3-VL.

    base            folder or hub name of a Qwen3VLForConditionalGeneration with its tokenizer
    video, template  how the judge reads; null takes video.json and prompt.json of the base's folder, else the defaults
    dimensions      name -> what one query token rewards. "overall" learns from the table's preference, a sub-dimension
                    (subject, dynamics, ...) from its ``answer``, another name (VQ, MQ, TA) from the column of that name
    lr, lora        what is trained and how fast; ``optimizer.lr`` is not used
    optimizer       AdamW's other settings
    zero_stage      as in `GrpoRun`, at least 1 with bfloat16. Whatever saved a checkpoint, any stage goes on from it
    heldout_pairs   how many held-out pairs are measured every ``eval_every`` steps (0 for never) and at the end
    """

    run_dir: str
    base: str
    data: PairFiles
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    dimensions: dict[str, RewardDimension] = field(default_factory=one_reward)
    lr: LearningRates = field(default_factory=LearningRates)
    lora: BackboneLora | None = field(default_factory=BackboneLora)
    video: VideoSettings | None = None
    template: str | None = None
    generation: Generation = field(default_factory=Generation)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    zero_stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)
    eval_every: int = 0
    heldout_pairs: int = 256
    save_every: int = 100
    keep: int = 2
    watchdog_s: float = 7200.0
    max_nonfinite_updates: int = 5
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        problems = _judge_problems(self)
        if not self.dimensions:
            problems.append("dimensions must name at least one, got none")
        if self.data.layout != "descore" and self.cold_start.masking.probability < 1:
            want = "cold_start.masking.probability=1"
            problems.append(
                f"data.layout={self.data.layout} has no chains of thought: it needs {want}"
            )
        check("ColdStartRun", problems)


@dataclass(frozen=True)
class DualRlRun:
    """DeScore's second stage on what `launch/cold_start.py` wrote.

    checkpoint      folder of a DeScore; template, video settings and generation come from it. Or of a plain Qwen3-VL,
                    which gets a new head, as the generative baseline needs none
    generation      null is the checkpoint's
    rules           rewards of the chains of thought
    writer          the engine that writes them
    lr, lora        what is trained and how fast (the vision tower and its merger are frozen at 0); lora null trains the
                    language model whole, beside a frozen copy of it
    optimizer       AdamW's other settings; max_grad_norm clips every part by its own norm
    zero_stage      as in `ColdStartRun`; 3 spreads the frozen copy over the ranks as well, below 3 each holds it whole
    heldout_pairs   how many held-out pairs are measured every ``eval_every`` steps (0 for never) and at the end
    """

    run_dir: str
    checkpoint: str
    data: PairFiles
    dual_rl: DualRlConfig = field(default_factory=DualRlConfig)
    rules: RuleRewardConfig = field(default_factory=RuleRewardConfig)
    cot_backend: CotBackendConfig = field(default_factory=CotBackendConfig)
    lr: LearningRates = field(
        default_factory=lambda: LearningRates(
            llm=1e-6, vision=0.0, merger=0.0, query=1e-6, head=1e-6
        )
    )
    lora: BackboneLora | None = None
    generation: Generation | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    zero_stage: int = 2
    deepspeed: dict[str, Any] = field(default_factory=dict)
    eval_every: int = 0
    heldout_pairs: int = 256
    save_every: int = 10
    keep: int = 2
    watchdog_s: float = 7200.0
    max_nonfinite_updates: int = 5
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        problems = _judge_problems(self)
        if self.data.layout != "descore":
            problems.append(
                f"data.layout must be descore, whose answers say what is right, not {self.data.layout}"
            )
        if self.lora is not None and self.lora.dropout > 0:
            problems.append(
                f"lora.dropout must be 0, got {self.lora.dropout}: it would change the importance ratio"
            )
        check("DualRlRun", problems)


@dataclass(frozen=True)
class SampleRun:
    """Videos of a generator, at seeds that depend on the prompt's place in the file only.

    adapter          folder of a trained adapter, null for the generator as it is
    seeds            videos per prompt; video k of prompt i has seed derive_seed(seed, "sample", i, k)
    limit            use only the first prompts of the file
    scheduler        "euler" walks the grid of training, "pipeline" is the stock WanPipeline with its own scheduler
    crf              quality of the mp4 files, see `common.video_io.write_mp4`
    """

    out: str
    prompts: str
    generator: GeneratorConfig
    adapter: str | None = None
    seed: int = 0
    seeds: int = 1
    limit: int | None = None
    scheduler: Literal["euler", "pipeline"] = "euler"
    crf: int = 12

    def __post_init__(self) -> None:
        problems = (
            [f"seeds must be at least 1, got {self.seeds}"] if self.seeds < 1 else []
        )
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit must be at least 1 or null, got {self.limit}")
        if not 0 <= self.crf <= 51:
            problems.append(f"crf must be in 0..51, got {self.crf}")
        check("SampleRun", problems)


def check_rewards(rewards: dict[str, RewardConfig]) -> None:
    for name, reward in rewards.items():
        factory_of(name, reward)


def _judge_problems(run: ColdStartRun | DualRlRun) -> list[str]:
    """What both stages of DeScore ask of the settings they share."""
    positive = ("heldout_pairs", "save_every", "keep")
    problems = [
        f"{n} must be at least 1, got {getattr(run, n)}"
        for n in positive
        if getattr(run, n) < 1
    ]
    problems += not_negative(run, "eval_every", "watchdog_s", "max_nonfinite_updates")
    if run.zero_stage not in ZERO_STAGES:
        problems.append(f"zero_stage must be 0, 1, 2 or 3, got {run.zero_stage}")
    if run.dtype == "bfloat16" and run.zero_stage == 0:
        problems.append("zero_stage must be at least 1 with dtype bfloat16, got 0")
    return problems
