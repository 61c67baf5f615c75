"""`launch/dual_rl.py` with the other engine: two ranks, each with a fake vLLM of its own."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from common.log import read_metrics
from common.video_io import write_mp4
from tests.launch.processes import deepspeed
from tests.rm.vllm.test_client import FAKE, talker
from tests.tiny_qwen import random_frames

ANSWER = (
    '<answer>{"video_1_scores": {"subject": "2"}, '
    '"video_2_scores": {"subject": "0"}}</answer>'
)


@pytest.mark.long
def test_two_ranks_with_a_vllm_backend_each(tmp_path: Path) -> None:
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["videos", "prompt", "GSB", "answer"])
        writer.writeheader()
        for i, label in enumerate("AB"):
            names = [f"{i}{side}.mp4" for side in "AB"]
            for side, name in enumerate(names):
                write_mp4(tmp_path / name, random_frames(10 * i + side), 4.0)
            writer.writerow(
                {
                    "videos": repr(names),
                    "prompt": f"p{i}",
                    "GSB": label,
                    "answer": ANSWER,
                }
            )
    talker().save(tmp_path / "judge")
    (tmp_path / "private").mkdir()
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
        "dual_rl.pairs_per_step=2",
        "dual_rl.pairs_per_update=2",
        "dual_rl.micro_batch=1",
        "dual_rl.group_size=2",
        "dual_rl.max_new_tokens=6",
        "rules.length=1",
        "rules.length_low=0",
        "rules.length_high=6",
        "lora.rank=4",
        "cot_backend.kind=vllm",
        f"cot_backend.python={sys.executable}",
        "cot_backend.max_model_len=1024",
        f"cot_backend.folder={tmp_path / 'private'}",
        f"cot_backend.env.PYTHONPATH={FAKE}",
        timeout=1800.0,
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["train/ratio_mean"] == pytest.approx(1.0) for row in rows)
    assert all(0 < row["cot/tokens"] <= 6 for row in rows)
    assert (tmp_path / "run" / "final" / "descore.json").is_file()
    assert list((tmp_path / "private").iterdir()) == []
