"""Runs whose rewards have parts on some ranks only, or never tell videos apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from alignment.rewards import wire
from common.log import read_metrics
from common.types import Score
from tests.alignment.rewards.test_remote import Scripted
from tests.launch.processes import ROOT, deepspeed, run

SCRIPT = str(ROOT / "launch" / "grpo.py")

# Its parts are in another order on each rank; its second call on rank 1 gives no score at all.
OWN_REWARD = """
import os
from common.types import Score

class Colours:
    calls = 0

    def score(self, video_BTYXC, prompts):
        self.calls += 1
        rank = os.environ["RANK"]
        if rank == "1" and self.calls == 2:
            return [None] * len(prompts)
        mean_BC = video_BTYXC.float().mean((1, 2, 3))
        red = mean_BC[:, 0]
        parts = {"big": 1000 + 0 * red, "small": 0 * red}
        if rank == "1":
            parts = dict(reversed(parts.items()))
        return Score(red, parts)
"""


def words_of(tiny: Path, folder: Path, *words: str) -> list[str]:
    return [
        SCRIPT,
        "--config",
        str(tiny),
        f"run_dir={folder}",
        "save_every=9",
        "self_checks=false",
        *words,
    ]


@pytest.mark.long
def test_run_goes_on_when_a_rank_has_no_parts(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "colours.py"
    file.write_text(OWN_REWARD)
    folder = tmp_path / "run"
    target = f"rewards.mine.target={file}:Colours"
    # brightness comes after it and must not get its columns
    deepspeed(2, *words_of(tiny, folder, target, "steps=3"))
    rows = read_metrics(folder / "metrics.jsonl")
    # 4 prompts of 2 members on 2 ranks
    assert [row["reward/mine_unscored"] for row in rows] == [0.0, 4.0, 0.0]
    for row in rows:
        assert (row["reward/mine.big"], row["reward/mine.small"]) == (1000.0, 0.0)
        assert 0.0 < row["reward/brightness"] < 1.0
        assert row["reward/brightness_unscored"] == 0.0


def with_parts(content: bytes) -> tuple[int, bytes]:
    """An answer of a server whose reward has parts."""
    request = wire.decode_request(content, wire.SAFETENSORS, wire.RequestLimits(99, 99))
    red = torch.stack(
        [item.video_TYXC[..., 0].float().mean() for item in request.items]
    )
    parts = {"b": torch.full_like(red, 7.0), "a": torch.full_like(red, 5.0)}
    score = Score(red, parts)
    reply = wire.encode_reply(request, score, [None] * len(red))
    return 200, json.dumps(reply).encode()


@pytest.mark.long
def test_group_that_a_server_with_parts_skips_leaves_the_rest(
    tiny: Path, tmp_path: Path
) -> None:
    server = Scripted(with_parts, with_parts, 403, with_parts)
    folder = tmp_path / "run"
    words = [
        "steps=2",
        "rewards.judge.options.model=bright",
        "rewards.judge.options.on_failure=skip_group",
        f"rewards.judge.url={server.url}",
    ]
    deepspeed(2, *words_of(tiny, folder, *words))
    first, second = read_metrics(folder / "metrics.jsonl")
    assert (first["reward/judge_unscored"], second["reward/judge_unscored"]) == (0, 4)
    for row in (first, second):
        assert (row["reward/judge.a"], row["reward/judge.b"]) == (5.0, 7.0)


@pytest.mark.long
def test_constant_reward_ends_the_run_with_a_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "constant.py"
    file.write_text("def score(video, prompts):\n    return [0.25] * len(prompts)\n")
    folder = tmp_path / "run"
    words = words_of(
        tiny,
        folder,
        "steps=20",
        "grpo.flat_reward_patience=3",
        "rewards.brightness.weight=0",
        f"rewards.mine.target={file}:score",
    )
    done = run(sys.executable, *words, expect=1)
    assert "rewards.mine (mean 0.25)" in done.stdout
    assert "Traceback" not in done.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
