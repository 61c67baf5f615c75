"""Settings of DeScore: how videos are read, what is trained, both stages. No torch here."""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.files import write_json
from common.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
    read_section,
)

# Bradley-Terry with ties (Rao and Kupper): 1 would leave no room for a tie.
TieParameter = Annotated[float, Field(gt=1.0)]
ThreeNumbers = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


@config
class VideoSettings:
    """How videos become patches; saved with the checkpoint.

    Defaults are DeScore's at full size: 2 frames a second, 448 x 448 pixels a frame.

    budget  "frame": min_pixels and max_pixels bound a frame (qwen-vl-utils, the official
            DeScore). "video": they bound frames * height * width (transformers' processor).
    """

    fps: PositiveFloat = 2.0
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    min_pixels: PositiveInt = 3_136
    max_pixels: PositiveInt = 200_704
    budget: Literal["frame", "video"] = "frame"
    patch_size: PositiveInt = 16
    merge_size: PositiveInt = 2
    temporal_patch_size: PositiveInt = 2
    mean: ThreeNumbers = (0.5, 0.5, 0.5)
    std: ThreeNumbers = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames={self.min_frames} must be at most max_frames={self.max_frames}"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} must be at most max_pixels={self.max_pixels}"
            )

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> VideoSettings:
        """Read a video.json. Raises ValueError, with the file, for an unknown key."""
        return read_section(cls, path)


@config
class BackboneLora:
    """Adapters on the language model's linears: W + (alpha / rank) B A."""

    rank: PositiveInt = 64
    alpha: float = 128.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05


@config
class LearningRates:
    """A learning rate for each part; 0 freezes it.

    "merger" holds the deepstack mergers too.
    """

    llm: NonNegativeFloat = 2e-6
    vision: NonNegativeFloat = 2e-6
    merger: NonNegativeFloat = 2e-6
    query: NonNegativeFloat = 2e-6
    head: NonNegativeFloat = 2e-6

    def __post_init__(self) -> None:
        if not any(asdict(self).values()):
            raise ValueError("all learning rates are 0: nothing would be trained")


@config
class Generation:
    """How a chain of thought is generated; saved with the checkpoint.

    Defaults are those of the official inference code.

    max_new_tokens      a CoT that is longer goes on to twice as many; if it is still longer, its
                        video gets no score.
    temperature         0 is greedy.
    repetition_penalty  divides positive and multiplies negative logits of every token that
                        is already in the sequence.
    """

    max_new_tokens: PositiveInt = 4_096
    temperature: NonNegativeFloat = 0.0
    repetition_penalty: PositiveFloat = 1.05


@config
class RewardDimension:
    """A query token and its row of the head.

    weight       in the reward: SUM over dimensions of weight times the dimension's reward.
    loss_weight  weight of its Bradley-Terry term.
    """

    weight: float = 1.0
    loss_weight: NonNegativeFloat = 1.0


def one_reward() -> dict[str, RewardDimension]:
    """Return DeScore's default: a single query for the overall quality."""
    return {"overall": RewardDimension()}


# Whether CoTs stood before the reward's query in training: in every sequence, in some, in none.
CotInTraining = Literal["always", "masked", "never"]


@config
class Masking:
    """Random masking of chains of thought in training, see `rm.masking`.

    Defaults are those of DeScore's released run.

    probability  of dropping a unit.
    per          "pair": A and B lose the same units. "video": each draws its own.
    unit         "cot" drops all or nothing; "section" and "sentence" drop each separately.
    """

    probability: Fraction = 0.5
    per: Literal["pair", "video"] = "pair"
    unit: Literal["cot", "section", "sentence"] = "cot"

    @property
    def cot_in_training(self) -> CotInTraining:
        """Whether a model trained with this masking sees CoTs."""
        if self.probability == 0:
            return "always"
        return "never" if self.probability == 1 else "masked"


@config
class ColdStartConfig:
    """Stage 1, the discriminative cold start. Defaults are DeScore's released run.

    pairs_per_step  preference pairs of an optimizer step, over ALL ranks.
    micro_batch     pairs in a forward, two sequences each.
    epochs          passes over the pairs.
    theta           null: ties give no loss and are not counted. Above 1: Bradley-Terry with
                    ties (VideoAlign uses 5).
    margin          by how much the better video must lead: sigmoid(d - margin). Excludes
                    theta.
    weight_decay    of all parameter groups but the query's.
    cache_gb        memory of each rank for prepared videos and token ids, so that later
                    epochs decode nothing.
    """

    pairs_per_step: PositiveInt = 32
    micro_batch: PositiveInt = 1
    epochs: PositiveFloat = 2.0
    masking: Masking = field(default_factory=Masking)
    theta: TieParameter | None = None
    margin: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    cache_gb: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        if self.margin and self.theta is not None:
            raise ValueError(
                f"margin={self.margin} and theta={self.theta} exclude each other"
            )


# What generates the CoTs: the model itself, or vLLM in a process beside it.
CotEngine = Literal["builtin", "vllm"]


@config
class VllmConfig:
    """How vLLM generates chains of thought, in a process beside this one (`rm.vllm.client`).

    python         interpreter of an environment with vLLM 0.32.
    gpu_memory     share of the GPU's memory for vLLM's weights, activations and KV cache; null is
                   what is free when vLLM starts, less reserve_gb. On a CPU null is a KV cache of
                   1 GiB.
    reserve_gb     memory in GiB that stays free for this process. Without ``sleep`` everything
                   that training or sampling needs beside vLLM must fit in.
    max_model_len  tokens of prompt and CoT together.
    sleep          free the GPU's memory whenever nothing is generated. Not on a CPU, where vLLM
                   cannot.
    folder         where a private folder for weights and videos is made; null is the
                   system's temporary folder.
    timeout_s      how long a request may take.
    env            environment variables of the process.
    engine_args    arguments of vLLM's ``LLM``; they override the computed ones.
    """

    python: str
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    reserve_gb: NonNegativeFloat = 4.0
    max_model_len: PositiveInt = 16_384
    sleep: bool = True
    folder: str | None = None
    timeout_s: PositiveFloat = 3_600.0
    env: dict[str, str] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)


@config
class DualRlConfig:
    """Stage 2, dual-objective RL. Defaults are DeScore's released run, but for advantage_std.

    engine            what generates the CoTs: the trained model itself ("builtin"), or a vLLM
                      process of each rank, on the rank's GPU ("vllm", with the section vllm).
                      All log-probabilities are the trained model's.
    pairs_per_step    preference pairs whose CoTs are sampled together, over ALL ranks.
    pairs_per_update  pairs of an optimizer step; pairs_per_step is a multiple.
    micro_batch       pairs in a forward, with two rows of group_size CoTs each.
    group_size        CoTs of each VIDEO.
    cot_batch         videos whose CoTs the built-in engine writes together, halved when memory
                      runs out; null is both of each pair of a micro-batch. A token reads all
                      weights whatever the batch, so a larger one is faster; the cache of
                      keys and values grows with it.
    cots_per_row      CoTs behind one prompt, see `rm.packed`; null is all. The attention
                      mask has (prompt + cots_per_row * CoT)^2 entries, so long CoTs need
                      fewer.
    attention         of packed rows: "flex" (FlexAttention, on a GPU) skips the blocks of
                      that mask in which nobody sees anybody, "mask" fills them; "auto" is
                      flex on a GPU.
    temperature       of sampling and of the log-probabilities.
    advantage_std     standard deviation that divides a group's advantages. "population" divides
                      the squares by group_size, "sample" by group_size - 1 as the release
                      does: its advantages are smaller, 1 / 1.069 at 8 CoTs.
    kl_weight         of the k3 estimate against the frozen stage-1 model, MEAN over tokens.
    bt_weight         of Bradley-Terry between rollout i of A and rollout i of B, MEAN over
                      decided (pair, rollout).
    theta             as in `ColdStartConfig`.
    """

    steps: PositiveInt = 65
    engine: CotEngine = "builtin"
    pairs_per_step: PositiveInt = 128
    pairs_per_update: PositiveInt = 4
    micro_batch: PositiveInt = 1
    group_size: Annotated[int, Field(ge=2)] = 8
    cot_batch: PositiveInt | None = None
    cots_per_row: PositiveInt | None = None
    attention: Literal["auto", "mask", "flex"] = "auto"
    temperature: PositiveFloat = 1.0
    advantage_std: Literal["population", "sample"] = "population"
    max_new_tokens: PositiveInt = 4_096
    clip_low: NonNegativeFloat = 0.2
    clip_high: NonNegativeFloat = 0.3
    dual_clip: Annotated[float, Field(gt=1.0)] = 3.0
    kl_weight: NonNegativeFloat = 1e-5
    bt_weight: NonNegativeFloat = 0.005
    theta: TieParameter | None = None
    weight_decay: NonNegativeFloat = 1e-2

    def __post_init__(self) -> None:
        if self.cots_per_row is not None and self.group_size % self.cots_per_row:
            raise ValueError(
                f"cots_per_row={self.cots_per_row} must divide group_size={self.group_size}"
            )
        if self.pairs_per_step % self.pairs_per_update:
            raise ValueError(
                f"pairs_per_step={self.pairs_per_step} must be a multiple of "
                f"pairs_per_update={self.pairs_per_update}"
            )


@config
class RuleRewardConfig:
    """Weights of the rule rewards of a CoT, and the shape of the length reward.

    Defaults are DeScore's weights; the length counts tokens and is linear, as in the paper.

    length_shape  "linear": 0 up to length_low, 1 from length_high on, a straight line
                  between. "steps": 0, 0.2, 0.4, 0.6, 1 at 500, 1000, 1500, 2000 (the
                  official release), times length_high / 2000.
    length_unit   "tokens", or "characters" of the text as the official release counts.
    preference    weight of `rm.text_rewards.preference_rewards`.
    think_tags    the format also needs <think> ... </think> before the answer.
    """

    quality: NonNegativeFloat = 0.7
    format: NonNegativeFloat = 0.1
    length: NonNegativeFloat = 0.2
    preference: NonNegativeFloat = 0.0
    length_unit: Literal["tokens", "characters"] = "tokens"
    length_shape: Literal["linear", "steps"] = "linear"
    length_low: NonNegativeInt = 500
    length_high: NonNegativeInt = 2000
    think_tags: bool = False

    def __post_init__(self) -> None:
        if self.length_low >= self.length_high:
            raise ValueError(
                f"length_low={self.length_low} must be below length_high={self.length_high}"
            )
