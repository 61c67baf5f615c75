"""Run the curl lines of docs/reward-server.md against a server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from common.video_io import write_mp4
from tests.alignment.rewards.test_remote import served
from tests.launch.processes import ROOT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_lines_score_an_mp4_and_frames(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "reward-server.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    grey = torch.full((5, 16, 16, 3), 102, dtype=torch.uint8)
    write_mp4(tmp_path / "clip.mp4", grey, 8.0)
    with served("rewards.descore.kind=brightness") as url:
        lines = script.replace("http://127.0.0.1:8900", url).replace(
            "curl -s", "curl -s -w '\\n'"
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
    models, mp4, frames = map(json.loads, done.stdout.splitlines())
    assert models == {"models": ["descore"]}
    # 102 / 255, but for the rounding of the video's codec
    assert mp4["values"] == [pytest.approx(0.4, abs=0.01)]
    assert frames["values"] == [0.0]
    assert (mp4["failed"], frames["failed"]) == (0, 0)
