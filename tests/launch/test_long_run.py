"""Memory and open files of a GRPO run over two hundred steps."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.log import read_metrics
from tests.launch.processes import ROOT


@pytest.mark.long
def test_memory_and_files_of_a_long_run_do_not_grow(tiny: Path, tmp_path: Path) -> None:
    """With checkpoints, samples and a second reward."""
    words = [
        "launch/grpo.py",
        "--config",
        str(tiny),
        f"run_dir={tmp_path / 'run'}",
        "steps=200",
        "save_every=10",
    ]
    words += [
        "keep=2",
        "video_every=20",
        "rewards.smoothness.weight=0.5",
        "self_checks=false",
    ]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    run, metrics = psutil.Process(process.pid), tmp_path / "run" / "metrics.jsonl"
    seen: list[tuple[int, float, int]] = []
    while process.poll() is None:
        done = len(read_metrics(metrics)) if metrics.exists() else 0
        if done and (not seen or done > seen[-1][0]):
            try:
                seen.append((done, run.memory_info().rss / 2**20, run.num_fds()))
            except psutil.NoSuchProcess:
                break
        time.sleep(0.02)
    assert process.wait() == 0
    assert len(read_metrics(metrics)) == 200
    later = [one for one in seen if one[0] >= 50]
    steps, memory, files = zip(*later, strict=True)
    slope = statistics.linear_regression(steps, memory).slope
    assert len(later) > 50
    assert slope < 1.0, f"{slope:.2f} MB a step"
    assert max(files) - min(files) <= 3, sorted(set(files))
