"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import check


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a constant rate. Defaults: LongCat-Video's open reproduction (GenRL).

    max_grad_norm  gradients are scaled down to this norm; 0 leaves them alone
    warmup_steps   optimizer step i (from 1) uses lr * min(1, i / warmup_steps)
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{n} must be at least 0, got {getattr(self, n)}"
            for n in _AT_LEAST_0
            if getattr(self, n) < 0
        ]
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {list(self.betas)}")
        check("OptimizerConfig", problems)


ZERO_STAGES = (0, 1, 2, 3)


_AT_LEAST_0 = ("lr", "eps", "weight_decay", "max_grad_norm", "warmup_steps")


@dataclass(frozen=True)
class EmaConfig:
    """An average of the trained weights over the optimizer's steps, see `engine.ema.Ema`."""

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"EmaConfig.decay must lie in [0, 1), got {self.decay}")
