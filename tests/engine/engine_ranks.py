"""Engines on real ranks, run by test_deepspeed.py; rank 0 prints one JSON line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from common import distributed
from engine.config import OptimizerConfig
from engine.deepspeed import build_engine
from engine.skip_nonfinite import SkipNonFinite
from engine.state import load_engine, save_engine
from launch.compose import quiet
from tests.fakes import PlainEngine

BACKWARDS = 4  # of one optimizer step, over all ranks
NOT_FINITE = [
    (0, torch.float32),
    (1, torch.float32),
    (2, torch.float32),
    (3, torch.float32),
    (1, torch.bfloat16),
    (2, torch.bfloat16),
    (3, torch.bfloat16),
]
OPTIMIZER = OptimizerConfig(
    lr=1e-2, weight_decay=0.1, max_grad_norm=0.0, warmup_steps=3, decay_steps=5
)
# What each step uses of the learning rate, by hand.
SHARES = (1 / 3, 2 / 3, 1.0, 0.55, 0.1)


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With a buffer that stays fp32, as rotary frequencies do."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)
    ).to(dtype)
    module[1].register_buffer("angle", torch.tensor([1 / 3]), persistent=False)
    return module


def loss(module: torch.nn.Module, step: int, i: int) -> torch.Tensor:
    source = distributed.seeded_generator(step, i)
    dtype = next(module.parameters()).dtype
    x, y = torch.randn(5, 7, generator=source), torch.randn(5, 3, generator=source)
    return (module(x.to(dtype)).float() - y).square().mean()


def train(engine, module: torch.nn.Module, steps: range) -> None:
    share = BACKWARDS // distributed.world_size()
    for step in steps:
        for i in range(share):
            engine.backward(loss(module, step, distributed.rank() * share + i))
            engine.step()


def engine_of(module: torch.nn.Module, stage: int):
    share = BACKWARDS // distributed.world_size()
    # by default ZeRO 3 leaves parameters below 100,000 numbers whole
    overrides = (
        {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        if stage == 3
        else None
    )
    return build_engine(
        module,
        optimizer=OPTIMIZER,
        zero_stage=stage,
        accumulation=share,
        overrides=overrides,
    )


def whole(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of its parameters, gathered from all ranks under ZeRO 3. All ranks call it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(module.parameters())):
        return [p.detach().clone() for p in module.parameters()]


def plain(steps: int) -> list[torch.Tensor]:
    """torch alone, with the rates written out."""
    module = network()
    engine = PlainEngine(
        module, accumulation=BACKWARDS, weight_decay=OPTIMIZER.weight_decay
    )
    for step in range(steps):
        engine.optimizer.param_groups[0]["lr"] = OPTIMIZER.lr * SHARES[step]
        for i in range(BACKWARDS):
            engine.backward(loss(module, step, i))
            engine.step()
    return whole(module)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(
        float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True)
    )


def check(
    stage: int, later_stage: int, dtype: torch.dtype, folder: Path
) -> dict[str, float]:
    straight = network(dtype)
    train(engine_of(straight, stage), straight, range(5))
    first = network(dtype)
    engine = engine_of(first, stage)
    train(engine, first, range(2))
    save_engine(engine, folder)
    distributed.barrier()
    second = network(dtype)
    torch.nn.init.zeros_(second[0].weight)  # whatever it was, the checkpoint decides
    engine = engine_of(second, later_stage)
    load_engine(engine, folder)
    resumed = distance(whole(first), whole(second))
    train(engine, second, range(2, 5))
    return {
        "buffer": abs(float(straight[1].angle) - 1 / 3),
        "plain": distance(plain(5), whole(straight)),
        "loaded": resumed,
        "resumed": distance(whole(straight), whole(second)),
    }


def not_finite(stage: int, dtype: torch.dtype) -> dict[str, float]:
    """Compare five updates, the second with a NaN on the last rank, with the other four.

    The learning rate is still rising.
    """
    module, wanted = network(dtype), network(dtype)
    engine = SkipNonFinite(engine_of(module, stage), patience=1)
    train(engine, module, range(1))
    before = whole(module)
    share = BACKWARDS // distributed.world_size()
    for i in range(share):
        bad = i == share - 1 and distributed.rank() == distributed.world_size() - 1
        engine.backward(loss(module, 9, i) * (float("nan") if bad else 1.0))
        engine.step()
    moved = distance(before, whole(module))
    skipped = engine.pop_skipped_count()
    train(engine, module, range(1, 4))
    straight = engine_of(wanted, stage)
    train(straight, wanted, range(4))
    return {
        "moved": moved,
        "skipped": skipped,
        "after": distance(whole(module), whole(wanted)),
    }


def first_is_not_finite() -> str:
    """Skip an update before there are moments; the second in a row raises."""
    module = network()
    engine = SkipNonFinite(engine_of(module, 1), patience=1)
    before = whole(module)
    message = ""
    for step in range(2):
        try:
            for i in range(BACKWARDS // distributed.world_size()):
                engine.backward(loss(module, step, i) * float("inf"))
                engine.step()
        except FloatingPointError as error:
            message = str(error)
    return message if distance(before, whole(module)) == 0 else "moved"


def apart(root: Path) -> str:
    """Return the error of saving when a weight of one rank differs."""
    module = network()
    engine = engine_of(module, 1)
    train(engine, module, range(1))
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-7 * distributed.rank()
    try:
        save_engine(engine, root)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    quiet()
    distributed.init_process_group()
    root = Path(
        distributed.from_main(tempfile.mkdtemp())
    )  # one folder for all ranks, removed by the first
    float32, bfloat16 = torch.float32, torch.bfloat16
    cases = {
        "0": (0, 0, float32),
        "1": (1, 1, float32),
        "2": (2, 2, float32),
        "2 to 0": (2, 0, float32),
    }
    cases |= {
        "3": (3, 3, float32),
        "2 to 3": (2, 3, float32),
        "3 to 1": (3, 1, float32),
    }
    cases |= {"1 bf16": (1, 1, bfloat16), "3 bf16": (3, 3, bfloat16)}
    cases |= {"2 bf16": (2, 2, bfloat16), "2 to 3 bf16": (2, 3, bfloat16)}
    results = {}
    for name, (stage, later, dtype) in cases.items():
        folder = root / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        results[name] = check(stage, later, dtype, folder)
    results["apart"] = apart(root)
    results["not finite"] = {
        f"{stage} {dtype}": not_finite(stage, dtype) for stage, dtype, *_ in NOT_FINITE
    }
    results["too often"] = first_is_not_finite()
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(root)
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
