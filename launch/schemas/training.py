"""Schemas of the training commands and of sampling. No torch: a typo shows at once."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from alignment.config import GrpoConfig
from common.schema import Fraction, NonNegativeInt, PositiveInt, config, run_config
from engine.config import EmaConfig, TrainingRun, check_grad_accumulation
from generator.config import (
    GeneratorConfig,
    GuidanceScale,
    check_one_rank_per_video,
    check_wan,
    check_zero_stage,
)
from launch.schemas.guards import GuardsConfig, check_guards
from launch.schemas.rewards import TrainingRewards, check_whole_groups
from rm.config import (
    BackboneLora,
    ColdStartConfig,
    DualRlConfig,
    Generation,
    LearningRates,
    RewardDimension,
    RuleRewardConfig,
    VideoSettings,
    VllmConfig,
    one_reward,
)
from rm.own_columns import check_columns

# Parts of the names of bases that are distilled to a few steps, and how many those are.
DISTILLED = (
    "distill",
    "fastwan",
    "causvid",
    "lightx2v",
    "self-forcing",
    "self_forcing",
    "turbo",
    "anyflow",
    "dmd",
    "lcm",
    "rcm",
)
FEW_STEPS = 4

# Constant rate factor of x264: 0 is lossless, 51 the smallest file.
Crf = Annotated[int, Field(ge=0, le=51)]
Scheduler = Literal["euler", "pipeline"]
TableLayout = Literal["descore", "videogen", "genai", "indomain"]


@config
class EvaluationConfig:
    """Held-out evaluation of a generator: before the first step, on the way, at the end.

    prompts          as in `GrpoRun`; none of them should be trained on.
    every            steps between two evaluations.
    limit            use only the first prompts of the file; null uses all.
    stock_scheduler  also sample with the stock pipeline's scheduler, as users will.
    videos           how many of the first prompts' videos are saved each time.
    steps            also sample in so many steps each, or jumps of a flow map: [1, 4] logs
                     eval_1/REWARD and eval_4/REWARD.
    usual_guidance   also sample with this guidance scale, that of the people who will use the
                     model, and log eval_usual/REWARD; null, or the sampler's, samples once.
    """

    prompts: str
    every: PositiveInt = 50
    limit: PositiveInt | None = 32
    stock_scheduler: bool = False
    videos: NonNegativeInt = 4
    steps: tuple[PositiveInt, ...] = ()
    usual_guidance: GuidanceScale | None = None


@config
class DiagnosisConfig:
    """A run that explains itself, see docs/diagnose.md.

    updates  the first updates that are measured, into measurements.jsonl: a few rollouts are
             sampled and scored again by another route. 0 measures none.
    said     print a line when something is off.
    """

    updates: NonNegativeInt = 5
    said: bool = True


@run_config
class GrpoRun(TrainingRun):
    """Longcat-GRPO. The checkpoint to resume from is chosen by ``--resume``.

    prompts           a .txt file with a prompt on each line, or a .jsonl file with
                      {"prompt": ...} lines.
    prompts_per_step  groups of an optimizer step, over ALL ranks. The number of ranks must
                      divide it, or with grpo.ranks_per_group the number of sets of ranks.
    rewards           name -> reward; a weight of 0 scores and logs without training on it.
    evaluation        evaluation on held-out prompts; null for none.
    ema               average of the weights: evaluated instead of them and exported as well;
                      null for none.
    cache_prompts     encode all prompts of this rank first, then free the prompt encoder.
    video_every       steps between saved sample videos, which are the step's own rollouts;
                      0 for none.
    video_groups      how many of rank 0's groups are saved then.
    guards            guards against rewards that are hacked; null for none.
    self_checks       check the generator and the rewards before training, see
                      `alignment.self_checks`.
    diagnosis         what the run finds out about itself; null switches it off.
    """

    prompts: str
    generator: GeneratorConfig
    rewards: TrainingRewards
    steps: PositiveInt = 500
    prompts_per_step: PositiveInt = 64
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    video_every: NonNegativeInt = 10
    video_groups: PositiveInt = 2
    self_checks: bool = True
    diagnosis: DiagnosisConfig | None = field(default_factory=DiagnosisConfig)
    evaluation: EvaluationConfig | None = None
    ema: EmaConfig | None = None
    cache_prompts: bool = False
    guards: GuardsConfig | None = None

    def __post_init__(self) -> None:
        sampler = self.generator.sampler
        check_zero_stage(self.generator, self.zero_stage)
        if self.zero_stage == 3 and sampler.tail_cache > 1:
            raise ValueError(
                "zero_stage 3 needs generator.sampler.tail_cache=1: all ranks must run the "
                "same transformer blocks"
            )
        if self.zero_stage == 3 and sampler.merge_adapter:
            raise ValueError(
                "zero_stage 3 needs generator.sampler.merge_adapter=false: it splits the weights "
                "that an adapter would be merged into"
            )
        if self.evaluation is not None and self.evaluation.steps:
            check_wan(self.generator, "evaluation.steps")
        if self.other_guidance is not None:
            check_wan(self.generator, "evaluation.usual_guidance")
            if sampler.guidance_scale_2 is not None:
                raise ValueError(
                    "evaluation.usual_guidance is one scale for all noise levels, and "
                    "generator.sampler.guidance_scale_2 is another: set either to null"
                )
        if self.cache_prompts:
            check_wan(self.generator, "cache_prompts")
        if self.zero_stage == 3:
            check_wan(self.generator, "zero_stage 3")
        if sampler.kernel == "anchor" and self.grpo.reweight in ("finite", "paper"):
            raise ValueError(
                f"grpo.reweight={self.grpo.reweight} holds for small steps: with "
                "generator.sampler.kernel=anchor set it to unit (or none)"
            )
        self._check_objective()
        for name, condition in self.grpo.reward_given.items():
            for reward in (name, condition.reward):
                if reward not in self.rewards:
                    raise ValueError(
                        f"grpo.reward_given.{name} names the reward {reward}, and there are "
                        f"{', '.join(self.rewards)}"
                    )
        check_whole_groups(self.rewards, self.grpo.ranks_per_group)
        check_guards(
            self.guards,
            self.rewards,
            kl_weight=self.grpo.kl_weight,
            has_evaluation=self.evaluation is not None,
        )
        if sampler.noise_level == 0:
            raise ValueError(
                "generator.sampler.noise_level must be positive, got 0: without noise the "
                "members of a group are equal"
            )

    @property
    def other_guidance(self) -> float | None:
        """The guidance of users, where it is not the one that is trained and evaluated."""
        settings = self.evaluation
        if settings is None:
            return None
        if settings.usual_guidance == self.generator.sampler.guidance_scale:
            return None
        return settings.usual_guidance

    def _check_objective(self) -> None:
        """Raise ValueError if the sampler does not make what the objective learns from."""
        # Stochastic steps are for the policy gradient, and only for it.
        name = self.grpo.objective
        sampler = self.generator.sampler
        if name == "policy":
            if sampler.stochastic == "none":
                raise ValueError(
                    "generator.sampler.stochastic=none has no density for "
                    "grpo.objective=policy: use nft, awm or dgpo, or another sampler.stochastic"
                )
            return
        if sampler.stochastic != "none":
            raise ValueError(
                f"grpo.objective={name} learns from videos of a solver whose members are "
                "independent: set generator.sampler.stochastic=none and "
                "generator.sampler.initial_noise=member"
            )
        # Rollout, update and evaluation must be the same model.
        if sampler.guidance_scale > 1 and not self.generator.guidance_in_update:
            raise ValueError(
                f"grpo.objective={name} with guidance needs generator.guidance_in_update=true, "
                "which doubles its cost; or set generator.sampler.guidance_scale=1 and sample "
                "the trained model without guidance, too"
            )
        if sampler.tail_guidance not in (None, sampler.guidance_scale):
            raise ValueError(
                f"grpo.objective={name} trains the velocity that samples: "
                "generator.sampler.tail_guidance must be null, and guidance_scale that of the "
                f"whole rollout, got {sampler.tail_guidance}"
            )
        # A video's levels are distinct.
        how = self.grpo.forward
        levels = len(how.trained_places(sampler.solver_steps))
        if levels < how.timesteps_per_sample:
            raise ValueError(
                f"grpo.forward.timesteps_per_sample={how.timesteps_per_sample} needs as many "
                f"noise levels, and timestep_range leaves {levels} of {sampler.solver_steps}"
            )
        self._check_distilled()

    def _check_distilled(self) -> None:
        """Raise ValueError for a base that is distilled to a few steps."""
        sampler = self.generator.sampler
        steps = sampler.solver_steps
        if steps > FEW_STEPS or self.grpo.forward.allow_distilled:
            return
        # the last part of a path or of a hub name says what it is
        name = self.generator.path.rstrip("/").rpartition("/")[2].lower()
        marks = [mark for mark in DISTILLED if mark in name]
        if marks:
            raise ValueError(
                f"grpo.objective={self.grpo.objective} on {self.generator.path} ({marks[0]}) in "
                f"{steps} steps: flow matching blurs a base that is distilled to a few steps; "
                "use objective=policy with sampler.kernel=cps, or force it by "
                "grpo.forward.allow_distilled=true"
            )


def check_own_columns(columns: dict[str, str], layout: TableLayout) -> None:
    """Raise ValueError for columns that cannot be renamed so."""
    check_columns(columns)
    if columns and layout != "descore":
        raise ValueError(
            f"columns are for layout=descore, and layout={layout} has columns of its own"
        )


@config
class PairFiles:
    """Tables of preference pairs: CSV files, or folders that hold a single CSV file.

    heldout        null evaluates nothing during training.
    limit          train on the first pairs only.
    layout         columns of both files, see `rm.benchmarks`. Only "descore" has chains of
                   thought and right scores; the others train a discriminative reward model.
    columns        own names of a table's columns: {prompt: text, video_A: left, video_B: right,
                   GSB: winner}; also CoT_A, CoT_B, answer, and videos for both paths in a cell.
    videos         folder of the videos; null is the folder of the CSV file.
    check_videos   decode every video in a separate process before training, see
                   `rm.video_check`. Pairs with a bad video are dropped and listed in
                   run_dir/bad_samples.jsonl.
    max_bad_share  share of the pairs that may be dropped; with more the run does not start.
    """

    train: str
    heldout: str | None = None
    limit: PositiveInt | None = None
    layout: TableLayout = "descore"
    columns: dict[str, str] = field(default_factory=dict)
    videos: str | None = None
    check_videos: bool = True
    max_bad_share: Fraction = 0.05

    def __post_init__(self) -> None:
        check_own_columns(self.columns, self.layout)
        if self.videos is not None and self.layout == "descore":
            raise ValueError(
                f"videos={self.videos} needs another layout: descore names its videos "
                "relative to the CSV file"
            )


@run_config
class RewardModelRun(TrainingRun):
    """What both stages of DeScore's training share.

    dtype          of the trained weights in the forward; bfloat16 needs zero_stage >= 1.
    eval_every     steps between two evaluations on the held-out pairs; 0 evaluates at the
                   end only.
    heldout_pairs  how many held-out pairs are used.
    """

    data: PairFiles
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    eval_every: NonNegativeInt = 0
    heldout_pairs: PositiveInt = 256

    def __post_init__(self) -> None:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError("zero_stage must be at least 1 with dtype bfloat16, got 0")
        check_grad_accumulation(
            self.deepspeed, zero_stage=self.zero_stage, dtype=self.dtype
        )


@run_config
class ColdStartRun(RewardModelRun):
    """DeScore's stage 1 on a Qwen3-VL.

    base        folder or hub name of a Qwen3VLForConditionalGeneration with its tokenizer.
    checkpoint  folder of a DeScore whose training goes on, with its query and head, prompt
                template and video settings; ``base``, ``template`` and ``video`` are then not
                read. null starts from the base with a new head.
    video       how videos are read; null takes video.json of the base's folder, or the
                defaults.
    template    file of the prompt template; null takes prompt.json of the base's folder, or
                the default.
    dimensions  name -> query token. "overall" learns from the table's preference, a
                sub-dimension (subject, dynamics, ...) from its ``answer``, another name
                (VQ, MQ, TA) from the column of that name.
    lr, lora    learning rates of the parts, and the adapter; ``optimizer.lr`` is not used.
    """

    base: str
    checkpoint: str | None = None
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    dimensions: Annotated[dict[str, RewardDimension], Field(min_length=1)] = field(
        default_factory=one_reward
    )
    lr: LearningRates = field(default_factory=LearningRates)
    lora: BackboneLora | None = field(default_factory=BackboneLora)
    video: VideoSettings | None = None
    template: str | None = None
    generation: Generation = field(default_factory=Generation)
    save_every: PositiveInt = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.layout != "descore" and self.cold_start.masking.probability < 1:
            raise ValueError(
                f"data.layout={self.data.layout} has no chains of thought: it needs "
                "cold_start.masking.probability=1"
            )


# DeScore's released rates of stage 2: the vision tower and the merger are frozen.
def _dual_rl_rates() -> LearningRates:
    return LearningRates(llm=1e-6, vision=0.0, merger=0.0, query=1e-6, head=1e-6)


@run_config
class DualRlRun(RewardModelRun):
    """DeScore's stage 2 on the result of `launch/cold_start.py`.

    checkpoint  folder of a DeScore, which also gives template and video settings. Or of a
                plain Qwen3-VL, which gets a new head (the generative baseline).
    generation  null takes the checkpoint's.
    rules       rule rewards of the chains of thought.
    vllm        how vLLM generates them, for dual_rl.engine=vllm; zero_stage is then at most 2.
    lr, lora    learning rates of the parts, and the adapter. lora null trains the whole
                language model beside a frozen copy, which zero_stage 3 shards as well.
    optimizer   ``max_grad_norm`` clips each parameter group by its own norm.
    """

    checkpoint: str
    dual_rl: DualRlConfig = field(default_factory=DualRlConfig)
    rules: RuleRewardConfig = field(default_factory=RuleRewardConfig)
    vllm: VllmConfig | None = None
    lr: LearningRates = field(default_factory=_dual_rl_rates)
    lora: BackboneLora | None = None
    generation: Generation | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    save_every: PositiveInt = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.layout != "descore":
            raise ValueError(
                f"data.layout must be descore, which has the right scores, "
                f"got {self.data.layout}"
            )
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout must be 0, got {self.lora.dropout}: dropout would change the "
                "importance ratio"
            )
        if self.dual_rl.engine == "vllm":
            self._check_vllm()

    def _check_vllm(self) -> None:
        if self.vllm is None:
            raise ValueError(
                "dual_rl.engine=vllm needs vllm.python, the interpreter of vLLM's environment"
            )
        # A rank then holds a part of each weight, and vLLM needs them all.
        if self.zero_stage == 3:
            raise ValueError("dual_rl.engine=vllm needs zero_stage 0 to 2, got 3")


@config
class SampleRun:
    """Videos of a generator; a seed depends only on the prompt's place in the file.

    adapter    folder of a trained adapter; null samples the generator without.
    seeds      videos per prompt; video k of prompt i has the seed
               derive_seed(seed, "sample", i, k).
    limit      use only the first prompts of the file.
    scheduler  "euler" is the grid of training, "pipeline" the stock WanPipeline with its
               scheduler.
    crf        quality of the mp4 files, see `common.video_io.write_mp4`.
    """

    out: str
    prompts: str
    generator: GeneratorConfig
    adapter: str | None = None
    seed: int = 0
    seeds: PositiveInt = 1
    limit: PositiveInt | None = None
    scheduler: Scheduler = "euler"
    crf: Crf = 12

    def __post_init__(self) -> None:
        check_one_rank_per_video(self.generator)
