"""Collectives over NCCL, context parallelism, and a GRPO run on two GPUs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.processes import ROOT, torchrun


@pytest.fixture(scope="module")
def ranks(device: torch.device) -> int:
    """Two ranks, each with its device."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return 2


@pytest.fixture(scope="module")
def found(device: torch.device, ranks: int, folder: Path) -> dict[str, Any]:
    script = str(ROOT / "tests/gpu/collective_ranks.py")
    done = torchrun(ranks, script, device.type, str(folder))
    return json.loads(done.stdout.splitlines()[-1])


def test_collectives_of_two_devices(
    found: dict[str, Any], device: torch.device
) -> None:
    values = found["collectives"]
    assert values["gathered"] == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert values["any"] is True
    assert values["none"] is False
    assert values["sum"] == [3, 3, 3]
    assert values["broadcast"] == 1
    assert values["differing"] == [1]
    assert values["same"] == []
    assert values["mean"]["x"] == 1.5
    assert math.isnan(values["mean"]["nan"])
    assert "on purpose" in values["together"]
    if device.type == "cuda":
        assert values["device of rank 1"] == "cuda:1"


def test_two_gpus_sharing_tokens_equal_one(found: dict[str, Any]) -> None:
    assert found["context"]["forward"] < 1e-4
    assert found["context"]["gap"] < 1e-4


@pytest.mark.parametrize(
    ("dtype", "overlap"), [("float32", "false"), ("bfloat16", "true")]
)
def test_grpo_trains_on_all_devices(
    tiny: Path, tmp_path: Path, device: torch.device, dtype: str, overlap: str
) -> None:
    count = min(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    words = [str(ROOT / "launch/grpo.py"), "--config", str(tiny), "steps=2"]
    words += [f"generator.dtype={dtype}", f"grpo.overlap_scoring={overlap}"]
    torchrun(count, *words, f"run_dir={tmp_path / 'run'}", "zero_stage=2")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2
    assert math.isfinite(first["train/grad_norm"])
    assert first["train/nonfinite_updates"] == 0
