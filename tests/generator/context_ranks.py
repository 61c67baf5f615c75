"""A tiny Wan whose tokens two ranks share, run by test_context_parallel.py on real ranks.

    python tests/generator/context_ranks.py WAN_FOLDER

Rank 0 prints a JSON line. Without context parallelism a rank computes by itself, so that every
process has both numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common import distributed
from common.distributed import seeded_generator
from engine.config import OptimizerConfig
from engine.deepspeed import build_engine
from engine.skip_nonfinite import SkipNonFinite
from generator import context_parallel
from generator.wan import WanGenerator
from launch.compose import quiet
from tests.tiny import tiny_generator

PROMPTS = ["a red circle", "rain"]
SIGMA = torch.tensor([0.9, 0.4])


def loss_of(generator: WanGenerator) -> tuple[Tensor, Tensor]:
    """The guided velocity of two latents, and its MEAN product with a fixed random tensor."""
    source = seeded_generator("context test")
    x, weight = torch.randn((2, 2, *generator.latent_shape), generator=source)
    velocity = generator.velocity(x, SIGMA, PROMPTS, guidance_scale=3.0)
    return velocity, (velocity * weight).mean()


def trained(generator: WanGenerator) -> list[Tensor]:
    return [p for p in generator.module.parameters() if p.requires_grad]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def compare(folder: Path, **changes: Any) -> dict[str, Any]:
    """Bits of the forward, and the gradient as a sum over ranks, against one rank's."""
    whole = tiny_generator(folder, **changes)
    velocity, loss = loss_of(whole)
    wanted = flat(list(torch.autograd.grad(loss, trained(whole))))

    shared = tiny_generator(folder, context_parallel=2, **changes)
    ours, loss = loss_of(shared)
    part = flat(list(torch.autograd.grad(loss, trained(shared))))
    total = part.clone()
    dist.all_reduce(total)

    # The reference has the same tokens to share, and alone there is nothing to share.
    with torch.no_grad(), shared.reference():
        reference = loss_of(shared)[0]
    with torch.no_grad(), whole.reference():
        whole_reference = loss_of(whole)[0]
    with context_parallel.alone(shared.transformer):
        by_itself = loss_of(shared)[0]
    again = loss_of(shared)[0]
    return {
        "bits": torch.equal(ours, velocity),
        "reference bits": torch.equal(reference, whole_reference),
        "alone bits": torch.equal(by_itself, velocity) and torch.equal(again, velocity),
        "sum": distance(total, wanted),
        "part": distance(part, wanted),
    }


def engine_gradient(folder: Path, stage: int) -> dict[str, Any]:
    """The gradient and its norm in a DeepSpeed engine against one rank's."""
    from deepspeed.utils import safe_get_full_grad

    whole = tiny_generator(folder, gradient_checkpointing=True)
    wanted = flat(list(torch.autograd.grad(loss_of(whole)[1], trained(whole))))

    shared = tiny_generator(folder, gradient_checkpointing=True, context_parallel=2)
    inner = build_engine(
        shared.module,
        optimizer=OptimizerConfig(max_grad_norm=0.0),
        zero_stage=stage,
        accumulation=1,
    )
    engine = SkipNonFinite(inner, patience=0, ranks_per_sample=2)
    # The check at the start of a run must not disturb the engine.
    gap = shared.context_gap()
    left = [p.grad for p in trained(shared) if p.grad is not None]
    engine.backward(loss_of(shared)[1])
    ours = flat([safe_get_full_grad(p) for p in trained(shared)])
    engine.step()
    return {
        "gap": gap,
        "gradients left": len(left),
        "gradient": distance(ours, wanted),
        "norm": abs(float(inner.get_global_grad_norm()) / float(wanted.norm()) - 1),
    }


def gap_without_sum(folder: Path) -> float:
    """What the start-up check sees when the parts of the gradient are not summed."""
    shared = tiny_generator(folder, context_parallel=2)
    true_sum = dist.all_reduce
    dist.all_reduce = lambda *_, **__: None
    try:
        return shared.context_gap()
    finally:
        dist.all_reduce = true_sum


def main() -> None:
    quiet()
    distributed.init_process_group()
    folder = Path(sys.argv[1])
    results = {
        "lora": compare(folder),
        "checkpointing": compare(folder, gradient_checkpointing=True),
        "full": compare(folder, lora=None),
        "zero 1": engine_gradient(folder, 1),
        "zero 2": engine_gradient(folder, 2),
        "gap without sum": gap_without_sum(folder),
    }
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
