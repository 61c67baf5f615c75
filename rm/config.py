"""Schemas of `rm`: how videos are read, what is trained, and a cold-start run. No torch, so a typo shows at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class VideoSettings:
    """How videos become patches; saved with the checkpoint. Defaults: DeScore at full size (2 fps, 448 x 448 a frame).

    budget  "frame": min_pixels and max_pixels bound one frame (qwen-vl-utils, the official DeScore);
            "video": they bound frames * height * width (transformers' processor)
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 3_136
    max_pixels: int = 200_704
    budget: Literal["frame", "video"] = "frame"
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON gives lists
        object.__setattr__(self, "std", tuple(self.std))
        if self.fps <= 0:
            raise ValueError(f"fps={self.fps} must be positive")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames={self.min_frames} must lie between 1 and max_frames={self.max_frames}"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} must lie between 1 and max_pixels={self.max_pixels}"
            )
        if self.budget not in ("frame", "video"):
            raise ValueError(f"budget={self.budget!r} must be 'frame' or 'video'")
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"mean={self.mean} and std={self.std} need three entries each"
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(
            json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, path: str | Path) -> VideoSettings:
        """ValueError, naming the file, for an unknown key."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown video settings {sorted(unknown)}")
        return cls(**raw)


@dataclass(frozen=True)
class BackboneLora:
    """Adapters on the language model's linears (spec 1.2): W + (alpha / rank) B A."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True)
class LearningRates:
    """One rate per part; 0 freezes it. "merger" holds the deepstack mergers too (spec 1.2, 2.2)."""

    llm: float = 2e-6
    vision: float = 2e-6
    merger: float = 2e-6
    query: float = 2e-6
    head: float = 2e-6

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise ValueError(
                    f"{f.name}={getattr(self, f.name)} must not be negative"
                )
        if not any(getattr(self, f.name) for f in fields(self)):
            raise ValueError("every learning rate is 0: nothing would be trained")


@dataclass(frozen=True)
class Generation:
    """How a chain of thought is written; saved with the checkpoint. Defaults: the official inference (spec section 4).

    max_new_tokens      a chain that is not finished by then is tried once more with twice as many, then not judged
    temperature         0 is greedy
    repetition_penalty  divides positive and multiplies negative logits of every token already in the sequence
    """

    max_new_tokens: int = 4_096
    temperature: float = 0.0
    repetition_penalty: float = 1.05

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be positive"
            )


@dataclass(frozen=True)
class RewardDimension:
    """One query token and its row of the head.

    weight       in the reward: SUM over dimensions of weight x the dimension's own reward
    loss_weight  of its Bradley-Terry term
    """

    weight: float = 1.0
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_weight < 0:
            raise ValueError(f"loss_weight={self.loss_weight} must not be negative")


def one_reward() -> dict[str, RewardDimension]:
    """DeScore's: a single query that says how good a video is overall."""
    return {"overall": RewardDimension()}


@dataclass(frozen=True)
class Masking:
    """Random masking of chains of thought in training, see `rm.masking`. Defaults: DeScore's released run.

    probability  of dropping a unit
    per          "pair": A and B lose the same units; "video": each draws for itself
    unit         "cot": all or nothing; "section" or "sentence": each for itself
    """

    probability: float = 0.5
    per: Literal["pair", "video"] = "pair"
    unit: Literal["cot", "section", "sentence"] = "cot"

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability={self.probability} must lie in [0, 1]")
        if self.per not in ("pair", "video"):
            raise ValueError(f"per={self.per!r} must be 'pair' or 'video'")
        if self.unit not in ("cot", "section", "sentence"):
            raise ValueError(
                f"unit={self.unit!r} must be 'cot', 'section' or 'sentence'"
            )


@dataclass(frozen=True)
class ColdStartConfig:
    """Stage 1, the discriminative cold start. Defaults: DeScore's released run (spec section 2).

    pairs_per_step    preference pairs of one optimizer step, over ALL ranks
    micro_batch       pairs in one forward (two sequences each)
    epochs            passes over the pairs
    theta             None: ties say nothing and are not counted; above 1: Bradley-Terry with ties (VideoAlign uses 5)
    margin            by how much the better one has to lead: sig(d - margin); without theta only
    weight_decay      of all groups but the query's
    cache_gb          memory on each rank for prepared videos and token ids, so that later epochs decode nothing
    """

    pairs_per_step: int = 32
    micro_batch: int = 1
    epochs: float = 2.0
    masking: Masking = field(default_factory=Masking)
    theta: float | None = None
    margin: float = 0.0
    weight_decay: float = 0.0
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pairs_per_step", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs} must be positive")
        if self.theta is not None and self.theta <= 1.0:
            raise ValueError(f"theta={self.theta} must be above 1, or null for no ties")
        for name in ("margin", "weight_decay", "cache_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.margin and self.theta is not None:
            raise ValueError(
                f"margin={self.margin} and theta={self.theta} exclude each other: theta is a margin"
            )


@dataclass(frozen=True)
class DualRlConfig:
    """Stage 2, dual-objective RL. Defaults: DeScore's released run (spec section 3).

    pairs_per_step    preference pairs whose chains are sampled together, over ALL ranks
    pairs_per_update  pairs of one optimizer step; pairs_per_step of them make several steps on the same chains
    micro_batch       pairs in one forward (two rows of group_size chains each)
    group_size        chains of each VIDEO
    cots_per_row    of them behind one prompt, see `rm.packed`; null is all. Attention's mask has
                      (prompt + cots_per_row * chain)^2 entries: long chains need fewer
    temperature       of sampling, and of the log-probabilities
    kl_weight         of the k3 estimate against the frozen stage-1 model, MEAN over tokens
    bt_weight         of Bradley-Terry between rollout i of A and rollout i of B, MEAN over decided (pair, rollout)
    theta             see `ColdStartConfig`
    """

    steps: int = 65
    pairs_per_step: int = 128
    pairs_per_update: int = 4
    micro_batch: int = 1
    group_size: int = 8
    cots_per_row: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 4_096
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float = 3.0
    kl_weight: float = 1e-5
    bt_weight: float = 0.005
    theta: float | None = None
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "pairs_per_step",
            "pairs_per_update",
            "micro_batch",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size} must be at least 2: an advantage compares members"
            )
        if self.cots_per_row is not None and (
            self.cots_per_row < 1 or self.group_size % self.cots_per_row
        ):
            raise ValueError(
                f"cots_per_row={self.cots_per_row} must divide group_size={self.group_size}"
            )
        if self.pairs_per_step % self.pairs_per_update:
            raise ValueError(
                f"pairs_per_step={self.pairs_per_step} must be a multiple of pairs_per_update={self.pairs_per_update}"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: a group of equal chains teaches nothing"
            )
        for name in ("clip_low", "clip_high", "kl_weight", "bt_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1")
        if self.theta is not None and self.theta <= 1.0:
            raise ValueError(f"theta={self.theta} must be above 1, or null for no ties")


@dataclass(frozen=True)
class CotBackendConfig:
    """What writes the chains of thought of stage 2. All but ``kind`` is for vllm, see `rm.vllm.client`.

    kind           "hf": the trained model itself; "vllm": a vLLM beside every rank, on the rank's GPU
    python         the interpreter (3.11 or later) of an environment with vLLM and transformers 5
    gpu_memory     share of the GPU's memory that vLLM takes: weights, activations, KV cache
    max_model_len  tokens of prompt and chain together
    sleep          give that memory back while the weights are trained
    folder         where a private folder for weights and videos is made; null is the system's temporary folder
    timeout_s      how long any answer may take
    env            environment variables of the process, VLLM_ATTENTION_BACKEND say
    engine_args    arguments of vLLM's ``LLM``, over those that are computed
    """

    kind: Literal["hf", "vllm"] = "hf"
    python: str | None = None
    gpu_memory: float = 0.6
    max_model_len: int = 16_384
    sleep: bool = True
    folder: str | None = None
    timeout_s: float = 3_600.0
    env: dict[str, str] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("hf", "vllm"):
            raise ValueError(f"kind={self.kind!r} must be 'hf' or 'vllm'")
        if self.kind == "vllm" and self.python is None:
            raise ValueError(
                "kind='vllm' needs python: the interpreter of vLLM's own environment"
            )
        if not 0.0 < self.gpu_memory <= 1.0:
            raise ValueError(f"gpu_memory={self.gpu_memory} must lie in (0, 1]")
        if self.max_model_len < 1:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be positive")
