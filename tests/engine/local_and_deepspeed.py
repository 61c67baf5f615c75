"""Three steps of two backwards with LocalEngine and with DeepSpeed; prints the largest difference.

The second step has a non-finite gradient, which neither may follow.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import nn

from common.distributed import init_process_group
from engine import LocalEngine
from engine.config import OptimizerConfig
from engine.deepspeed import build_engine
from engine.skip_nonfinite import SkipNonFinite

ACCUMULATION = 2


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def main() -> None:
    init_process_group()
    settings = OptimizerConfig(lr=0.1, weight_decay=0.05, max_grad_norm=0.5)
    ours = module()
    theirs = module()
    deepspeed = build_engine(
        theirs, optimizer=settings, zero_stage=0, accumulation=ACCUMULATION
    )
    engines = {
        "local": LocalEngine(
            ours,
            accumulation=ACCUMULATION,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        ),
        "deepspeed": SkipNonFinite(deepspeed, patience=2),
    }
    x = torch.randn(6, 4, 3)
    for step in range(3):
        for part in range(ACCUMULATION):
            for engine, model in zip(engines.values(), (ours, theirs), strict=True):
                loss = model(x[step * ACCUMULATION + part]).square().mean()
                if step == 1:
                    loss = loss * math.inf
                engine.backward(loss)
                engine.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    gaps = [float((mine - other).abs().max().detach()) for mine, other in pairs]
    start = [float(p.abs().max().detach()) for p in module().parameters()]
    moved = [float(p.abs().max().detach()) for p in ours.parameters()]
    sys.stdout.write(f"gap {max(gaps):.3e} skipped {engines['local'].skipped}\n")
    assert start != moved


if __name__ == "__main__":
    main()
