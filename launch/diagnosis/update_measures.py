"""Measure an optimizer step: the gradient over ranks, what it moved, and whether it helped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from common.distributed import differing_ranks, gather_objects, world_size

if TYPE_CHECKING:
    from torch import Tensor, nn


# A matrix whose gradient is smaller than this part of the largest may stand still.
SMALL_GRADIENT = 1e-3
# The KL term must have this part of the policy term's gradient, or its factor is rounding.
KL_TELLS = {"float32": 3e-4, "bfloat16": 0.1}


class GradientRecorder:
    """Adds up the gradients of a step on this rank, before the engine averages them."""

    def __init__(self, module: nn.Module) -> None:
        self.total: dict[str, Tensor] = {}
        # Of the step's first backward, which is that of the first group.
        self.first: dict[str, Tensor] = {}
        self.active = False
        self._handles = []
        # A hook on the tensor: it sees each backward, before ZeRO reduces it.
        for name, parameter in trained(module).items():
            handle = parameter.register_hook(lambda g, name=name: self._add(name, g))
            self._handles.append(handle)

    def _add(self, name: str, gradient: Tensor) -> None:
        if not self.active:
            return
        # Accumulated in fp32, whatever the engine accumulates in.
        gradient = gradient.detach().float()
        if name in self.total:
            self.total[name] += gradient
        else:
            self.total[name] = gradient.clone()
            self.first[name] = gradient.cpu().clone()

    def start(self) -> None:
        """Begin a step."""
        self.total = {}
        self.first = {}
        self.active = True

    def norm(self) -> float:
        """The norm of the MEAN over ranks. All ranks must call this."""
        self.active = False
        square = 0.0
        # A rank may lack the gradient of a parameter that it did not use.
        names = sorted(set().union(*gather_objects(list(self.total))))
        for name in names:
            gradient = _mean_over_ranks(self.total[name])
            square += float(gradient.double().square().sum())
        return math.sqrt(square)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self.total = {}
        self.first = {}


def _mean_over_ranks(x: Tensor) -> Tensor:
    if world_size() == 1:
        return x
    # all_gather and not all_reduce: the latter may be what is broken.
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts).mean(dim=0)


class WeightRecorder:
    """Tells how far the trained weights moved since the last look."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = self._copies()

    def look(
        self,
        gradients: Mapping[str, Tensor],
        *,
        rate: float,
    ) -> dict[str, float]:
        """Measure all trained weights. All ranks must call this.

        gradients  of this step, by name
        rate       the learning rate
        """
        now = self._copies()
        # Squares over all weights, and over each of the adapter's matrices.
        moved = 0.0
        count = 0
        norms = {"lora_A": 0.0, "lora_B": 0.0}
        numbers = {"lora_A": 0, "lora_B": 0}
        for name, weight in now.items():
            change = weight - self.before[name]
            moved += float(change.double().square().sum())
            count += weight.numel()
            for matrix in norms:
                if matrix in name:
                    norms[matrix] += float(weight.double().square().sum())
                    numbers[matrix] += 1
        found = {"weights/still": _standing(self.before, now, gradients)}
        self.before = now
        # rms per weight, absolute and in learning rates.
        found |= {
            "weights/moved": math.sqrt(moved / max(1, count)),
            "weights/moved_per_rate": math.sqrt(moved / max(1, count))
            / max(rate, 1e-30),
            "weights/ranks_apart": float(len(differing_ranks(now))),
        }
        # Matrices of the adapter that nobody trains.
        frozen = 0
        for name, parameter in self.module.named_parameters():
            if "lora_" in name and not parameter.requires_grad:
                frozen += 1
        found["adapter/frozen"] = float(frozen)
        for matrix, square in norms.items():
            found[f"adapter/{matrix}_norm"] = math.sqrt(square)
            found[f"adapter/{matrix}_trained"] = float(numbers[matrix])
        return found

    @contextmanager
    def put_back(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module has these weights; its own come back to the bit."""
        own = {}
        for name, parameter in trained(self.module).items():
            own[name] = parameter.detach().clone()
        self._write(weights)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in trained(self.module).items():
            parameter.copy_(weights[name])

    def _copies(self) -> dict[str, Tensor]:
        copies = {}
        for name, parameter in trained(self.module).items():
            copies[name] = parameter.detach().float().cpu().clone()
        return copies


def follows(
    average: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
) -> dict[str, float]:
    """How far an average of the weights has come from their start, relative to the weights."""
    came = 0.0
    went = 0.0
    for name, old in start.items():
        average_moved = average[name].cpu() - old
        moved = now[name] - old
        came += float(average_moved.square().sum())
        went += float(moved.square().sum())
    # Weights that did not move cannot be followed.
    if went == 0:
        return {}
    return {"ema/came": math.sqrt(came / went)}


def _standing(
    before: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> float:
    """Share of the matrices with a gradient in which no number moved."""
    norms = {}
    for name, gradient in gradients.items():
        norms[name] = float(gradient.norm())
    # A gradient near 0 may round away.
    least = SMALL_GRADIENT * max(norms.values(), default=0.0)
    pushed = 0
    still = 0
    for name, weight in now.items():
        if norms.get(name, 0.0) <= least:
            continue
        pushed += 1
        if torch.equal(before[name], weight):
            still += 1
    return still / max(1, pushed)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
