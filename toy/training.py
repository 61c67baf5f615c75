"""Train a tiny model of the embedded world with resumable AdamW."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

_WARM_UP = 0.05


@dataclass(frozen=True)
class Fit:
    """Settings of a training stage.

    name   Name of the stage and of its state file in ``work``.
    steps  Number of optimizer steps.
    peak   Learning rate after the warm-up.
    every  Steps between two saved states; an evaluation follows each of them.
    slow   Parameters with this in their name were trained before and get a fifth of the rate.
    """

    name: str
    steps: int
    peak: float
    work: Path
    every: int = 200
    slow: str | None = None


def fit(
    settings: Fit,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train with a linear warm-up over 5 % of the steps and a cosine decay to zero.

    ``loss_at(step)`` draws its data from the step alone. The state (weights and both Adam moments)
    is one safetensors file, so that an interrupted stage continues from its last saved state.
    """
    parameters = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameters[key] = parameter

    # Continue from the last saved state, if there is one.
    optimizer = _build_optimizer(settings, parameters)
    state_file = settings.work / f"{settings.name}.safetensors"
    start = _load_state(state_file, parameters, optimizer)
    began = time.time()
    steps = range(start, settings.steps)
    bar = tqdm(steps, settings.name, initial=start, total=settings.steps, mininterval=5)
    for step in bar:
        # 1. Set the rate: warm-up times cosine.
        warm = min(1.0, (step + 1) / (_WARM_UP * settings.steps))
        cosine = 1 + math.cos(math.pi * (step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * settings.peak * warm * 0.5 * cosine

        # 2. Step. The seed makes the noise a function of the step alone.
        torch.manual_seed(step)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

        # 3. Save and evaluate.
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            _save_state(state_file, step + 1, parameters, optimizer)
            measured = {
                "step": step + 1,
                "loss": loss.item(),
                "grad_norm": norm.item(),
            }
            measured |= evaluate()
            line = "  ".join(f"{k} {v:.4g}" for k, v in measured.items())
            tqdm.write(f"{settings.name}  {line}  {time.time() - began:.0f} s")


def cached(file: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """Read a tensor from a file, which is written first if it does not exist."""
    if not file.exists():
        save_file({name: make()}, file)
    return load_file(file)[name]


def _build_optimizer(
    settings: Fit, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    # Parameters by the share of the rate that they get.
    shares: dict[float, list[nn.Parameter]] = {1.0: [], 0.2: []}
    for name, parameter in parameters.items():
        slow = settings.slow is not None and settings.slow in name
        shares[0.2 if slow else 1.0].append(parameter)

    # AdamW refuses an empty group.
    groups = [{"params": p, "scale": share} for share, p in shares.items() if p]
    return torch.optim.AdamW(
        groups, lr=settings.peak, betas=(0.9, 0.98), weight_decay=1e-3
    )


def _load_state(
    file: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
) -> int:
    """Restore weights and moments from the file, if it exists, and return the next step."""
    if not file.exists():
        return 0
    saved = load_file(file)
    step = int(saved["step"])
    for key, parameter in parameters.items():
        parameter.data.copy_(saved[f"weight.{key}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": saved[f"first.{key}"],
            "exp_avg_sq": saved[f"second.{key}"],
        }
    return step


def _save_state(
    file: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"weight.{key}"] = parameter.data.contiguous()
        tensors[f"first.{key}"] = moments["exp_avg"].contiguous()
        tensors[f"second.{key}"] = moments["exp_avg_sq"].contiguous()

    # A killed save leaves the earlier state as it was.
    partial = file.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(file)
