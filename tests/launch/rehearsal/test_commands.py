"""Every command that can be rehearsed, in the embedded world; configs/wan take minutes each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
QWEN = ROOT / "assets" / "shapes" / "qwen"


def rehearse(*words: object, out: Path, code: int = 0) -> dict[str, Any]:
    """Run a command with --rehearse and return its JSON."""
    done = subprocess.run(
        [sys.executable, *map(str, words), "--rehearse-out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def traffic(result: dict[str, Any], direction: str, file: str) -> int:
    """Bytes that the lines of a file move."""
    return sum(
        size
        for phase in result["phases"].values()
        for line, size in phase[direction].items()
        if line.startswith(f"{file}:")
    )


VIDEO = 5 * 32 * 32 * 3  # bytes of a video of the embedded world


@pytest.mark.slow
def test_grpo(tmp_path, descore):
    result = rehearse(
        "launch/grpo.py",
        "--config=configs/shapes/grpo.yaml",
        "--rehearse=2xh100",
        "prompts_per_step=4",
        "grpo.group_size=4",
        f"rewards.descore.checkpoint={descore}",
        "zero_stage=2",
        out=tmp_path / "grpo.json",
    )
    # Two groups of four videos leave the device.
    moved = traffic(result, "device_to_host_bytes", "generator/latents.py")
    assert moved == 2 * 4 * VIDEO
    phases = {"rollout", "decode", "score/descore", "update", "optimizer step"}
    assert phases < result["phases"].keys()
    # Adam's second moment, so that no step was skipped.
    assert result["phases"]["optimizer step"]["kernels"]["addcmul_"] > 0
    assert result["faults"] == []


@pytest.mark.long
def test_grpo_with_overlapping_scores(tmp_path, descore):
    result = rehearse(
        "launch/grpo.py",
        "--config=configs/shapes/grpo.yaml",
        "--rehearse=1xh100",
        "prompts_per_step=2",
        "grpo.group_size=4",
        "grpo.overlap_scoring=true",
        f"rewards.descore.checkpoint={descore}",
        out=tmp_path / "overlap.json",
    )
    assert result["phases"]["in a thread"]["kernels"]["gemm_bf16"] > 0


@pytest.mark.long
def test_parts_of_an_update_that_are_left_out_are_multiplied(tmp_path):
    def update(prompts: int) -> dict[str, Any]:
        return rehearse(
            "launch/grpo.py",
            "--config=configs/shapes/grpo.yaml",
            "--rehearse=1xh100",
            f"prompts_per_step={prompts}",
            "grpo.group_size=2",
            "rewards.descore=null",
            "rewards.shapes=null",
            "rewards.people=null",
            "rewards.brightness.weight=1",
            out=tmp_path / f"{prompts}.json",
        )

    # Of 16 groups 8 run.
    half, whole = update(8)["phases"], update(16)["phases"]
    times = whole["update"]["kernels"]["mul"] / half["update"]["kernels"]["mul"]
    assert times == pytest.approx(2, rel=0.02)
    step = "optimizer step"
    assert whole[step]["kernels"] == half[step]["kernels"]


@pytest.mark.long
def test_dpo_under_zero_3(tmp_path):
    result = rehearse(
        "launch/dpo.py",
        "--config=configs/shapes/dpo.yaml",
        "--rehearse=2xa100",
        "dpo.pairs_per_step=4",
        "dpo.micro_batch=2",
        "zero_stage=3",
        out=tmp_path / "dpo.json",
    )
    assert result["device"].startswith("A100")
    assert result["phases"]["optimizer step"]["seconds"] > 0


@pytest.mark.long
def test_pairs(tmp_path, descore):
    result = rehearse(
        "launch/pairs.py",
        "--config=configs/shapes/pairs.yaml",
        "--rehearse=2xh100",
        "pairs.candidates=3",
        f"rewards.descore.checkpoint={descore}",
        out=tmp_path / "pairs.json",
    )
    moved = traffic(result, "device_to_host_bytes", "generator/latents.py")
    assert moved == 3 * VIDEO


@pytest.mark.long
def test_cold_start(tmp_path):
    result = rehearse(
        "launch/cold_start.py",
        "--config=configs/shapes/cold_start.yaml",
        "--rehearse=2xh100",
        f"base={QWEN}",
        "cold_start.pairs_per_step=4",
        "cold_start.micro_batch=1",
        out=tmp_path / "cold_start.json",
    )
    assert {"update", "optimizer step"} < result["phases"].keys()


@pytest.mark.long
def test_dual_rl_samples_its_own_chains(tmp_path):
    result = rehearse(
        "launch/dual_rl.py",
        "--config=configs/shapes/dual_rl.yaml",
        "--rehearse=2xh100",
        f"checkpoint={QWEN}",
        "dual_rl.pairs_per_step=8",
        "dual_rl.pairs_per_update=2",
        "dual_rl.micro_batch=1",
        "dual_rl.group_size=2",
        out=tmp_path / "dual_rl.json",
    )
    # 4 updates of a pair a rank: 96 tokens and the end of each batch, and no wait per token.
    chains = result["phases"]["CoTs"]
    assert chains["kernels"]["searchsorted"] == 4 * (96 + 1)
    waits = [n for line, n in chains["waits"].items() if "rm/generate.py" in line]
    assert max(waits) == 4


@pytest.mark.long
def test_sample(tmp_path):
    result = rehearse(
        "launch/sample.py",
        "--config=configs/shapes/sample.yaml",
        "--rehearse=2xh100",
        "adapter=null",
        out=tmp_path / "sample.json",
    )
    moved = traffic(result, "device_to_host_bytes", "generator/latents.py")
    assert moved == VIDEO


@pytest.mark.long
def test_score(tmp_path, descore):
    result = rehearse(
        "launch/score.py",
        "--config=configs/shapes/score.yaml",
        "--rehearse=1xh100",
        "batch=2",
        f"rewards.descore.checkpoint={descore}",
        out=tmp_path / "score.json",
    )
    assert traffic(result, "host_to_device_bytes", "rm/model.py") > 0


@pytest.mark.long
def test_evaluate_generator(tmp_path, descore):
    result = rehearse(
        "launch/evaluate.py",
        "generator",
        "--config=configs/shapes/evaluate.yaml",
        "--rehearse=2xh100",
        "batch=2",
        "adapter=null",
        f"rewards.descore.checkpoint={descore}",
        out=tmp_path / "evaluate.json",
    )
    moved = traffic(result, "device_to_host_bytes", "generator/latents.py")
    assert moved == 2 * VIDEO


@pytest.mark.long
def test_serve(tmp_path, descore):
    result = rehearse(
        "launch/serve.py",
        "--config=configs/shapes/serve.yaml",
        "--rehearse=1xh100",
        f"rewards.descore.checkpoint={descore}",
        out=tmp_path / "serve.json",
    )
    assert result["phases"]["in a thread"]["seconds"] > 0


@pytest.mark.slow
def test_a_command_that_cannot_be_rehearsed_says_so(tmp_path):
    words = ["launch/evaluate.py", "rm", "--config=configs/shapes/evaluate_rm.yaml"]
    done = subprocess.run(
        [sys.executable, *words, "--rehearse"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "RewardEvaluation" in done.stderr
