"""The comparison of the fast sampler differs in the sampler alone, and counts its forwards."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from common.config import load
from experiments.fast_sampler import ARMS, PAIRS, forwards_of
from experiments.oracle_scores import run_folder
from experiments.runner import CONFIGS
from generator.config import GeneratorConfig
from launch.planning.forwards import samples_per_rollout
from launch.schemas.training import GrpoRun
from tests.launch.processes import run


def generator_of(arm: str) -> GeneratorConfig:
    run_config = load(GrpoRun, CONFIGS / "grpo_oracle.yaml", ARMS[arm].overrides)
    return run_config.generator


def test_arms_of_a_pair_share_grid_and_kernel() -> None:
    for plain, fast in PAIRS:
        one, two = generator_of(plain), generator_of(fast)
        same = dataclasses.replace(
            two.sampler, tail_steps=None, tail_solver="euler", merge_adapter=False
        )
        assert same == one.sampler
        assert two.sampler.merge_adapter
        assert two.sampler.tail_solver == "ab2"
        assert one.dtype == "float32"
        assert two.dtype == ("float32" if fast == "fast_fp32" else "bfloat16")
    assert (
        generator_of("plain") == load(GrpoRun, CONFIGS / "grpo_oracle.yaml").generator
    )


def test_forwards_of_the_arms_by_hand() -> None:
    """MEAN of k + 1, and G tails: 2.5 + 8 * 5.5, 2.5 + 8 * 3, 3.5 + 8 * 12.5, 3.5 + 8 * 6."""
    counts = [samples_per_rollout(generator_of(arm).sampler, 8) for arm in ARMS]
    assert counts == [46.5, 26.5, 26.5, 103.5, 51.5]


@pytest.mark.long
def test_smallest_comparison_of_samplers(tmp_path: Path) -> None:
    words = ["--seeds", "0", "--updates", "1", "--prompts", "3", "--rounds", "1"]
    again = [
        sys.executable,
        "experiments/fast_sampler.py",
        "--run-dir",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path),
        "--arms",
        "plain",
        "fast",
    ]
    run(*again, *words, timeout=900)
    record = json.loads((tmp_path / "fast_sampler.json").read_text(encoding="utf-8"))
    assert list(record["arms"]) == ["base", "plain", "fast"]
    assert "against the plain sampler" in record["arms"]["fast"]
    assert list(record["timing"]["arms"]) == ["plain", "fast"]
    fast = forwards_of(run_folder(tmp_path / "run", 0, "fast"))
    assert fast < forwards_of(run_folder(tmp_path / "run", 0, "plain"))
