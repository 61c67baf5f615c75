"""Settings that every training run shares. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config import WandbConfig
from common.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    config,
    run_config,
)

# At 1 an average would never move.
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

# DeepSpeed's names for the dtype that gradients are added up in.
_FLOAT32 = ("fp32", "float32", "torch.float32", "float")
_BFLOAT16 = ("bf16", "bfloat16", "torch.bfloat16")


def check_grad_accumulation(
    deepspeed: Mapping[str, Any], *, zero_stage: int, dtype: str
) -> None:
    """Raise ValueError for a dtype of accumulated gradients under which training goes wrong.

    dtype  of the trained weights: "float32" or "bfloat16"
    """
    key = "deepspeed.data_types.grad_accum_dtype"
    types = deepspeed.get("data_types") or {}
    if not isinstance(types, Mapping):
        raise ValueError(f"deepspeed.data_types must be a mapping, got {types!r}")
    accumulated = types.get("grad_accum_dtype")
    if accumulated is None:
        return
    if accumulated not in (*_FLOAT32, *_BFLOAT16):
        raise ValueError(f"{key} must be fp32 or bf16, got {accumulated!r}")
    if dtype == "bfloat16" and accumulated in _FLOAT32 and zero_stage == 1:
        raise ValueError(
            f"{key}={accumulated} with zero_stage 1 and bfloat16 weights: DeepSpeed then adds "
            "each gradient once for every later backward, which multiplies them; use "
            "zero_stage=2, where fp32 is the default"
        )
    if dtype == "float32" and accumulated in _BFLOAT16:
        raise ValueError(
            f"{key}={accumulated} needs bfloat16 weights; the trained weights are float32"
        )


# Share of the learning rate at which a falling one stays.
LEAST_RATE = 0.1


@config
class OptimizerConfig:
    """AdamW with a linear warm-up, then a constant rate or one that falls.

    Defaults are those of GenRL, the open reproduction of LongCat-Video.

    max_grad_norm  gradients are scaled down to this norm; 0 leaves them as they are.
    warmup_steps   step i, counted from 1, uses lr * min(1, i / warmup_steps).
    decay_steps    step at which the rate has fallen linearly to a tenth of lr, where it stays;
                   0 keeps it constant.
    """

    lr: NonNegativeFloat = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-4
    max_grad_norm: NonNegativeFloat = 1.0
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Raise ValueError if the rate would fall before it has risen."""
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} must be 0 or greater than "
                f"warmup_steps={self.warmup_steps}"
            )

    def rate_share(self, step: int) -> float:
        """Share of lr that a step uses, counted from 1."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if not self.decay_steps:
            return 1.0
        length = self.decay_steps - self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / length)
        return 1.0 - (1.0 - LEAST_RATE) * done


@config
class EmaConfig:
    """An exponential moving average of the trained weights, see `engine.ema.Ema`."""

    decay: Decay = 0.99


@run_config
class TrainingRun:
    """What the four training commands share: GRPO, DPO and both stages of DeScore.

    run_dir                folder of the run. Started again, a run resumes from it.
    zero_stage             DeepSpeed ZeRO: 0 shards nothing, 1 the optimizer's state, 2 also
                           the gradients, 3 also the trained weights. A checkpoint of any
                           stage can be resumed with any other. Gradients of bfloat16 weights
                           are added up in fp32 under 2 and 3, and in bfloat16 under 1.
    deepspeed              keys of DeepSpeed's own JSON; they override the computed ones.
    save_every             steps between checkpoints; the last step is always saved.
    save_minutes           a step is saved too when the last checkpoint is older than this;
                           0 goes by ``save_every`` alone.
    keep                   how many of the newest checkpoints stay on disk.
    watchdog_s             a run in which nothing moves for so many seconds prints its stacks
                           and exits; 0 turns the watchdog off. A step may take longer: its
                           forwards, backwards, tokens and scores count.
    max_nonfinite_updates  optimizer steps with a non-finite gradient are skipped; after so
                           many in a row the run stops.
    tensorboard            also write TensorBoard files in run_dir/tensorboard; the extra
                           "tensorboard" installs that package.
    """

    run_dir: str
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)
    save_every: PositiveInt = 50
    save_minutes: NonNegativeFloat = 30.0
    keep: PositiveInt = 2
    watchdog_s: NonNegativeFloat = 7200.0
    max_nonfinite_updates: NonNegativeInt = 5
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
