"""LocalEngine: an engine for a single process, without DeepSpeed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class LocalEngine:
    """AdamW behind the Protocol `common.types.Engine`, for scripts and notebooks.

    As with DeepSpeed, the gradient of a step is the MEAN over ``accumulation`` backwards, its
    norm is clipped, and a step with a non-finite gradient changes no weight.

    module         its parameters that require a gradient are trained
    accumulation   backwards before the optimizer takes a step
    max_grad_norm  None does not clip

    Raises ValueError when the module has nothing to train, or accumulation is below 1.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        accumulation: int = 1,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("LocalEngine: no parameter of the module is trained")
        if accumulation < 1:
            raise ValueError(f"accumulation={accumulation} must be at least 1")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=weight_decay
        )
        self.accumulation = accumulation
        self.max_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.backwards = 0
        self.skipped = 0
        self._norm: float | None = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss to the step's."""
        (loss / self.accumulation).backward()
        self.backwards += 1

    def step(self) -> None:
        """Take the optimizer step if this was the last backward of it; otherwise do nothing."""
        if self.backwards % self.accumulation:
            return
        # the norm before clipping
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self._norm = float(norm)
        if math.isfinite(self._norm):
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad()

    def grad_norm(self) -> float | None:
        """Return the last step's gradient norm before clipping; None before the first step."""
        return self._norm
