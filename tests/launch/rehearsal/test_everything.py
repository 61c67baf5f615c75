"""The embedded world on a device that is not the CPU, with real numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Runs two steps of GRPO and prints their metrics; argv: cpu or gpu, a DeScore, a folder.
PROGRAM = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from launch.compose import quiet
quiet()
from common import distributed
from common.config import load
from launch.planning.roofline import RATES
from launch.schemas.training import GrpoRun
from launch.training.grpo_loop import build

where, descore, folder = sys.argv[1:]
cfg = load(GrpoRun, Path("configs/shapes/grpo.yaml"), [
    "prompts_per_step=2", "grpo.group_size=4", f"rewards.descore.checkpoint={descore}",
    f"run_dir={folder}", "generator.gradient_checkpointing=true", "zero_stage=2",
    "generator.sampler.num_steps=4", "generator.sampler.stochastic_range=2",
    "generator.sampler.guidance_scale=3.0", "rewards.descore.options={dtype: float32}",
])
prompts = Path("assets/shapes/prompts_train.txt").read_text().splitlines()[:8]
with ExitStack() as stack:
    if where == "gpu":
        from launch.rehearsal.device import SimulatedGpu
        from launch.rehearsal.rehearse import simulated
        gpu = SimulatedGpu(RATES["h100"], everything=True)
        stack.enter_context(simulated(gpu, 1))
    else:
        distributed.init_process_group()
    loop = build(cfg, prompts)
    for step in range(2):
        metrics = loop.step(step).metrics
        print(json.dumps({k: v for k, v in metrics.items() if "second" not in k}))
    if where == "gpu":
        assert not gpu.faults, gpu.faults
        guessed = sum(costs.guesses.total() for costs in gpu.ledger.phases.values())
        print(json.dumps({"guesses": guessed}))
"""


def run(where: str, descore: Path, folder: Path) -> list[dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, where, str(descore), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.long
def test_grpo_on_the_simulated_device_has_the_numbers_of_the_cpu(tmp_path, descore):
    cpu = run("cpu", descore, tmp_path / "cpu")
    *gpu, counted = run("gpu", descore, tmp_path / "gpu")
    assert counted["guesses"] == 0
    for on_cpu, on_gpu in zip(cpu, gpu, strict=True):
        for name in ("reward/descore", "train/loss", "train/grad_norm", "train/kl"):
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-3, abs=1e-6), name
