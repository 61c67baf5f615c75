"""`launch/dual_rl.py` with vLLM: two ranks, each with a stand-in for vLLM of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.log import read_metrics
from tests.launch.dual_rl_runs import write_pairs_table
from tests.launch.processes import deepspeed
from tests.rm.vllm.test_client import FAKE, talker


@pytest.mark.long
def test_two_ranks_with_a_vllm_each(tmp_path: Path) -> None:
    write_pairs_table(tmp_path)
    talker().save(tmp_path / "judge")
    private = tmp_path / "private"
    private.mkdir()
    deepspeed(
        2,
        "launch/dual_rl.py",
        "--config",
        "configs/shapes/dual_rl.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"checkpoint={tmp_path / 'judge'}",
        f"data.train={tmp_path / 'pairs.csv'}",
        "data.heldout=null",
        "dual_rl.steps=2",
        "dual_rl.engine=vllm",
        "dual_rl.pairs_per_step=2",
        "dual_rl.pairs_per_update=2",
        "dual_rl.micro_batch=1",
        "dual_rl.group_size=2",
        "dual_rl.max_new_tokens=6",
        "rules.length=1",
        "rules.length_low=0",
        "rules.length_high=6",
        "lora.rank=4",
        f"vllm.python={sys.executable}",
        "vllm.max_model_len=1024",
        f"vllm.folder={private}",
        f"vllm.env.PYTHONPATH={FAKE}",
        timeout=1800.0,
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["train/ratio_mean"] == pytest.approx(1.0) for row in rows)
    assert all(0 < row["cot/tokens"] <= 6 for row in rows)
    assert (tmp_path / "run" / "final" / "descore.json").is_file()
    assert list(private.iterdir()) == []
