"""TODO."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    peak: float,
    work: Path,
    evaluate: Callable[[], dict[str, float]],
    every: int = 200,
    slow: str | None = None,
) -> dict[str, float]:
    """AdamW with a linear warm-up of 5 % and a cosine to zero; ``loss_at(step)`` draws its own data from the step.

    The whole state (weights, both Adam moments) is one safetensors file, written every ``every`` steps, so that a
    stopped stage goes on where it was. Parameters with ``slow`` in their name, trained by an earlier stage, take a
    fifth of the rate. Returns the last evaluation.
    """
    import math

    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
    late = [p for k, p in parameters.items() if slow is not None and slow in k]
    new = [p for k, p in parameters.items() if slow is None or slow not in k]
    groups = [{"params": new, "scale": 1.0}, {"params": late, "scale": 0.2}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=peak,
        betas=(0.9, 0.98),
        weight_decay=1e-3,
    )
    state_file = work / f"{name}.safetensors"
    start = 0
    if state_file.exists():
        saved = load_file(state_file)
        start = int(saved.pop("step"))
        for key, parameter in parameters.items():
            parameter.data.copy_(saved[f"weight.{key}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(start)),
                "exp_avg": saved[f"first.{key}"],
                "exp_avg_sq": saved[f"second.{key}"],
            }
    measured: dict[str, float] = {}
    began = time.time()
    for step in tqdm(
        range(start, steps), desc=name, initial=start, total=steps, mininterval=5
    ):
        warm, done = min(1.0, (step + 1) / (0.05 * steps)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = (
                group["scale"] * peak * warm * 0.5 * (1 + math.cos(math.pi * done))
            )
        torch.manual_seed(step)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            tensors = {"step": torch.tensor(step + 1)}
            for key, parameter in parameters.items():
                tensors[f"weight.{key}"] = parameter.data.contiguous()
                tensors[f"first.{key}"] = optimizer.state[parameter][
                    "exp_avg"
                ].contiguous()
                tensors[f"second.{key}"] = optimizer.state[parameter][
                    "exp_avg_sq"
                ].contiguous()
            partial = state_file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(state_file)
            measured = {
                "step": step + 1,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                **evaluate(),
            }
            line = "  ".join(f"{k} {v:.4g}" for k, v in measured.items())
            tqdm.write(f"{name}  {line}  {time.time() - began:.0f} s")
    return measured or evaluate()
