"""What a rehearsal puts in the place of things that it cannot simulate."""

from __future__ import annotations

from common.config import load
from launch.rehearsal.stand_ins import adapt
from launch.schemas.training import DualRlRun, GrpoRun
from tests.launch.processes import ROOT

SHAPES = ROOT / "configs" / "shapes"


def test_builtin_engine_stands_for_vllm_in_stage_2(tmp_path):
    words = ["dual_rl.engine=vllm", "vllm.python=/nowhere/python"]
    checkpoint = f"checkpoint={ROOT / 'assets' / 'shapes' / 'qwen'}"
    cfg = load(DualRlRun, SHAPES / "dual_rl.yaml", [*words, checkpoint])
    adapted = adapt(cfg, tmp_path, 2)
    assert adapted.cfg.dual_rl.engine == "builtin"
    assert any("vllm" in note for note in adapted.notes)


def test_builtin_engine_stands_for_vllm_in_a_reward(tmp_path):
    words = [
        f"rewards.descore.checkpoint={tmp_path}",
        "rewards.descore.options.engine=vllm",
        "rewards.descore.options.vllm.python=/nowhere/python",
    ]
    adapted = adapt(load(GrpoRun, SHAPES / "grpo.yaml", words), tmp_path / "made", 1)
    options = adapted.cfg.rewards["descore"].options
    assert options["engine"] == "builtin"
    assert any("vllm" in note for note in adapted.notes)
