"""Two GRPO steps in every precision and ZeRO stage, run by test_grpo_matrix.py on real ranks.

    python tests/launch/grpo_ranks.py CONFIG

Rank 0 prints one JSON line: {case: results}. Adapters start at random weights, so that the
policy differs from its reference and the loss is not zero.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import launch.training.grpo_loop
from common import distributed
from common.config import load
from engine.config import EmaConfig
from engine.ema import Ema
from engine.zero3 import whole_state
from generator.wan import WanGenerator
from launch.compose import quiet
from launch.schemas.training import GrpoRun
from launch.training.grpo_loop import build
from tests.launch.processes import ZERO_3

LORA, FULL = "generator.lora.rank=4", "generator.lora=null"
CASES: dict[str, list[str]] = {}
for _dtype in ("float32", "bfloat16"):
    for _stage in (1, 2, 3):
        CASES[f"{_dtype} {_stage}"] = [
            f"generator.dtype={_dtype}",
            f"zero_stage={_stage}",
        ]
    for _stage in (1, 3):
        CASES[f"{_dtype} {_stage} full"] = [
            f"generator.dtype={_dtype}",
            f"zero_stage={_stage}",
            FULL,
        ]
for _stage in (1, 2):
    # also with the adapter merged in prefix and tail
    CASES[f"float32 {_stage} merged"] = [
        "generator.dtype=float32",
        f"zero_stage={_stage}",
        "generator.sampler.merge_adapter=true",
    ]
ALONE = {"float32 0": ["generator.dtype=float32", "zero_stage=0"]}
SHARED = {
    f"float32 {stage} shared": [f"zero_stage={stage}", "grpo.ranks_per_group=2"]
    for stage in (1, 3)
}
SHARED["float32 1 side by side"] = ["zero_stage=1", "grpo.overlap_scoring=true"]


def moved(cfg: Any, *, seed: int = 0) -> WanGenerator:
    """The generator with every trained weight a little off its start."""
    generator = WanGenerator.load(cfg, device="cpu", seed=seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.module.parameters():
            if parameter.requires_grad:
                size = 0.1 if cfg.lora is not None else 0.02
                parameter.add_(
                    size
                    * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
                )
    return generator


def checksums_of_frozen(generator: WanGenerator) -> list[str]:
    """Of every weight that is not trained; those that ZeRO 3 splits are empty between uses."""
    weights = [p for p in generator.module.parameters() if not p.requires_grad]
    return [
        sha256(weight.detach().float().numpy().tobytes()).hexdigest()
        for weight in weights
    ]


def check(config: str, overrides: list[str]) -> dict[str, Any]:
    stage = [word for word in ZERO_3[1:] if "zero_stage=3" in overrides]
    cfg = load(
        GrpoRun,
        Path(config),
        [*overrides, *stage, "grpo.kl_weight=1.0", "grpo.group_size=4"],
    )
    prompts = ["a red circle", "a blue square", "two cats", "rain", "snow"]
    loop = build(cfg, prompts)
    generator = loop.generator
    ema = Ema(EmaConfig(decay=0.5), generator.module)
    start = {name: tensor.clone() for name, tensor in ema.average.items()}
    frozen = checksums_of_frozen(generator)
    history, seen = [], []
    for step in range(2):
        history.append(loop.step(step))
        ema.update()
        seen.append(whole_state(generator.module, trained_only=True))
    with ema.swapped_in():
        inside = whole_state(generator.module, trained_only=True)
    after = whole_state(generator.module, trained_only=True)
    # d = min(1/2, (1 + n) / (10 + n)) is 2/11 and 3/12
    expected = {
        name: 3 / 12 * (2 / 11 * start[name] + 9 / 11 * seen[0][name].float())
        + 9 / 12 * seen[1][name].float()
        for name in seen[0]
    }
    state = ema.state()
    return {
        "ratio": [result.metrics["train/ratio_max_dev"] for result in history],
        **{
            key: [result.metrics.get(f"train/{key}") for result in history]
            for key in ("loss", "kl", "grad_norm")
        },
        "reward": [result.metrics["reward/brightness"] for result in history],
        "moved": max(
            (float((seen[1][n].float() - start[n]).abs().max()) for n in seen[1]),
            default=0.0,
        ),
        "average": max(
            (float((ema.average[n] - expected[n]).abs().max()) for n in expected),
            default=0.0,
        ),
        "swapped": all(torch.equal(inside[n], state[n]) for n in inside),
        "frozen": checksums_of_frozen(generator) == frozen,
        "restored": all(torch.equal(after[n], seen[1][n]) for n in after),
    }


def main() -> None:
    quiet()
    distributed.init_process_group()
    launch.training.grpo_loop.build_generator = moved
    cases = CASES | (SHARED if distributed.world_size() > 1 else ALONE)
    results = {
        name: check(sys.argv[-1], overrides) for name, overrides in cases.items()
    }
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
