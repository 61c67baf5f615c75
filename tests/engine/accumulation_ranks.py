"""The gradient that engines add up over 64 backwards; run by test_deepspeed.py.

One weight, whose gradients are 16 once and 1/64 in the other backwards. Their sum is 16 + 63 / 64;
in bfloat16 16 + 1/64 is 16. Rank 0 prints a JSON line: the norm that each engine's step has seen.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from common import distributed
from engine.config import OptimizerConfig
from engine.deepspeed import build_engine
from launch.compose import quiet

BACKWARDS = 64


def norm_of(stage: int, dtype: torch.dtype, overrides: dict[str, Any]) -> list[float]:
    """The gradient norms of two updates in a row: the second starts from nothing."""
    module = torch.nn.Linear(1, 1, bias=False).to(dtype)
    share = BACKWARDS // distributed.world_size()
    engine = build_engine(
        module,
        optimizer=OptimizerConfig(max_grad_norm=1e9),
        zero_stage=stage,
        accumulation=share,
        overrides=overrides,
    )
    norms = []
    for _ in range(2):
        for i in range(share):
            first = i == 0 and distributed.is_main()
            slope = 16.0 if first else 1 / 64
            # the engine averages over the backwards of all ranks
            loss = module(torch.ones(1, 1, dtype=dtype)).sum() * slope
            engine.backward(loss * BACKWARDS)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def main() -> None:
    quiet()
    distributed.init_process_group()
    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    wrong = {"data_types": {"grad_accum_dtype": "fp32"}}
    results = {}
    for stage in (1, 2, 3):
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            overrides = whole if stage == 3 else {}
            results[f"{stage} {name}"] = norm_of(stage, dtype, overrides)
    # what the check refuses, to see that DeepSpeed still gets it wrong
    import engine.config

    engine.config.check_grad_accumulation = lambda *_, **__: None
    results["refused"] = norm_of(1, torch.bfloat16, wrong)
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
