"""The ablations at their smallest: trained and evaluated by the real commands, counted by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from common.config import load
from common.files import read_jsonl
from experiments.oracle_scores import run_folder
from experiments.reproduce_grpo import (
    ARMS,
    BASE,
    configs_of,
    cost_of_update,
    groups_of,
    read_training,
    updates_of,
)
from generator.config import SamplerConfig
from launch.planning.forwards import samples_per_rollout
from launch.schemas.training import GrpoRun
from tests.launch.processes import run


def test_samples_of_a_rollout_by_hand() -> None:
    plain = {"num_steps": 8, "stochastic_range": 4, "guidance_scale": 1.0}
    # k = 0..3: (k + 1) + 8 (7 - k) = 57, 50, 43, 36
    assert samples_per_rollout(SamplerConfig(**plain), 8) == (57 + 50 + 43 + 36) / 4
    assert (
        samples_per_rollout(SamplerConfig(**{**plain, "guidance_scale": 4.5}), 8)
        == 2 * (57 + 50 + 43 + 36) / 4
    )
    # a tail of three: (k + 1) + 24
    assert (
        samples_per_rollout(SamplerConfig(**plain, tail_steps=3), 8)
        == (25 + 26 + 27 + 28) / 4
    )
    assert samples_per_rollout(SamplerConfig(**plain, initial_noise="member"), 8) == 64
    everything = {
        **plain,
        "stochastic": "all",
        "stochastic_range": 8,
        "initial_noise": "member",
    }
    assert samples_per_rollout(SamplerConfig(**everything), 8) == 64
    # windows of 4 from 0 to 4, the start shared: (k + 1) + 8 (7 - k)
    window = {**plain, "stochastic": "window", "window_size": 4, "stochastic_range": 8}
    assert (
        samples_per_rollout(SamplerConfig(**window), 8) == (57 + 50 + 43 + 36 + 29) / 5
    )


def test_arms_differ_and_cost_as_much_as_the_recipe() -> None:
    runs = {
        name: load(GrpoRun, configs_of(name), arm.extra) for name, arm in ARMS.items()
    }
    assert {
        arm for members in groups_of(list(ARMS)).values() for arm in members
    } == set(ARMS)
    recipe = runs[BASE]
    assert cost_of_update(recipe) == 16 * (46.5 + 3 + 1)
    for name, cfg in runs.items():
        assert (cfg.generator.sampler, cfg.grpo, cfg.prompts_per_step) != (
            recipe.generator.sampler, recipe.grpo, recipe.prompts_per_step
        ) or name == BASE  # fmt: skip
        # nothing but the algorithm differs
        assert cfg.optimizer == recipe.optimizer, name
        assert cfg.generator.lora == recipe.generator.lora, name
        assert cfg.generator.sampler.num_steps == 8, name
        assert cfg.prompts_per_step * cfg.grpo.group_size == 128, (
            name
        )  # the same videos an update
        if ARMS[name].group != "tail":
            assert updates_of(name, 400) * cost_of_update(cfg) == pytest.approx(
                400 * cost_of_update(recipe), rel=0.01
            )
    assert updates_of("tail_ab2", 400) == 400


@pytest.mark.long
def test_smallest_comparison_of_grpo(tmp_path: Path) -> None:
    words = ["--seeds", "0", "--updates", "1", "--prompts", "3", "--arms", "flow_grpo"]
    again = [
        sys.executable,
        "experiments/reproduce_grpo.py",
        "--run-dir",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path),
    ]
    run(*again, *words, timeout=600)
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.jsonl")
    }
    run(*again, *words)  # started again there is nothing left to do
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    record = json.loads((tmp_path / "reproduce_grpo.json").read_text(encoding="utf-8"))
    assert list(record["arms"]) == ["base", BASE, "flow_grpo"]
    flow = read_training(run_folder(tmp_path / "run", 0, "flow_grpo"))
    cfg = load(GrpoRun, configs_of("flow_grpo"), ARMS["flow_grpo"].extra)
    assert (
        flow.forwards == cost_of_update(cfg) == 16 * (64 + 64 * 4)
    )  # as counted by a hook, as computed, by hand
    assert [spent for spent, _ in flow.curve] == [0.0, flow.forwards]
    assert (flow.updates, flow.videos) == (1, 128)
    for arm, row in record["arms"].items():
        folder = run_folder(tmp_path / "run", 0, arm)
        rows = read_jsonl(folder / "eval" / "results.jsonl")
        values = [row["rewards"]["shapes"] for row in rows]
        assert row["oracle"]["mean"] == pytest.approx(sum(values) / 3)
    assert flow.curve[0][1] == pytest.approx(
        record["arms"]["base"]["oracle"]["mean"]
    )  # before training it is the base
    page = (tmp_path / "reproduce_grpo.md").read_text(encoding="utf-8")
    assert "Flow-GRPO | 1 | 128 | 5120 |" in page
    assert "<svg" in (tmp_path / "reproduce_grpo.svg").read_text(encoding="utf-8")
