"""Run the commands of README.md and docs/: as they stand, or with --dry-run if they need GPUs.

The desk is a folder with a copy of the programs and of everything that the pages assume: videos,
prompts, checkpoints and published releases, all tiny and random.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from common.video_io import write_mp4
from rm.config import Generation
from rm.model import DeScore
from tests import official_checkpoint, public_checkpoints
from tests.documented import COMMANDS, ROOT, Command, blocks
from tests.launch.processes import BIN
from tests.launch.test_export import make_run
from tests.test_docs import module_of
from tests.tiny import build_tiny_wan
from tests.tiny_qwen import SETTINGS, TEMPLATE, tiny_qwen, tiny_tokenizer
from toy import world

STEP_BY_STEP = {"embedded-world.md"}  # pages whose blocks need those before them
CODES = {
    "launch/check_rewards.py": (0, 1)
}  # 1: a judge that has learned nothing does not order videos sensibly
DEVICE = "8xh100"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    for name in (
        "launch",
        "configs",
        "assets",
        "rm",
        "alignment",
        "generator",
        "engine",
        "toy",
        "experiments",
        "examples",
        "common",
    ):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    write_files_to_score(folder)
    write_published_releases(folder)
    (folder / "runs").mkdir()
    rates = {"device": "h100", "rates": {"gemm_bf16": 6.2e14}}
    (folder / "runs/gpu_check.json").write_text(json.dumps(rates))
    for name in ("runs/demo/descore/final", "runs/wan/descore/final"):
        writing = Generation(max_new_tokens=40, temperature=2.0, repetition_penalty=1.0)
        DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, writing).save(
            folder / name
        )
    make_run(build_tiny_wan(folder / "base"), folder / "runs/wan/grpo")
    (page,) = [
        text for _, text in blocks("python") if text.startswith("# my_reward.py")
    ]
    (folder / "my_reward.py").write_text(page)
    return folder


def write_files_to_score(folder: Path) -> None:
    prompts = (
        (ROOT / "assets/shapes/prompts_heldout.txt")
        .read_text(encoding="utf-8")
        .splitlines()[:3]
    )
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    (folder / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    (folder / "all_dimension.txt").write_text("a cat\na dog\n")
    (folder / "all_dimension_aug_wanx_seed42.txt").write_text(
        "a black cat\na large dog\n"
    )
    (folder / "clips").mkdir()
    with open(
        folder / "pairs.csv", "w", newline="", encoding="utf-8"
    ) as file:  # docs/data.md has the columns
        table = csv.writer(file)
        table.writerow(["videos", "prompt", "GSB"])
        table.writerows(
            [repr([f"clips/{i}.mp4", f"clips/{other}.mp4"]), prompts[i], "A"]
            for i, other in ((0, 1), (1, 2), (2, 0))
        )
    for i, prompt in enumerate(prompts):
        scene = world.random_scene(world.parse(prompt), random.Random(i))
        write_mp4(folder / "clips" / f"{i}.mp4", world.render([scene])[0], 8)


def write_published_releases(folder: Path) -> None:
    official_checkpoint.write(folder / "checkpoint-N", official_checkpoint.train())
    (folder / "instruction.txt").write_text(
        "Text: [insert prompt here]\nVideo: <video>\nJudge it."
    )
    for name in ("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct"):
        public_checkpoints.save_base(folder / name)
    public_checkpoints.write_videoreward(
        folder / "VideoReward", public_checkpoints.videoreward()
    )
    public_checkpoints.write_hpsv3(folder / "hpsv3", public_checkpoints.hpsv3())
    (folder / "hpsv3/HPSv3.safetensors").rename(folder / "HPSv3.safetensors")
    (folder / "VideoReward/instruction.txt").rename(folder / "videoreward.txt")
    (folder / "hpsv3/instruction.txt").rename(folder / "hpsv3.txt")


def unmarked() -> dict[str, list[Command]]:
    """Return the unmarked commands by block, or by page where blocks need each other.

    Of equal blocks only the last is returned.
    """
    found: dict[str, list[Command]] = defaultdict(list)
    for command in COMMANDS:
        if not command.marks:
            page = command.place.partition(":")[0]
            found[page if page in STEP_BY_STEP else command.place].append(command)
    alike = {
        tuple(command.bare for command in block): (place, block)
        for place, block in found.items()
    }
    return dict(alike.values())


@pytest.mark.parametrize(("place", "block"), unmarked().items(), ids=unmarked())
def test_unmarked_commands_run(desk: Path, place: str, block: list[Command]) -> None:
    """The commands of a block, or of a whole page, one after the other, in one shell."""
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(desk),
    }
    script = "set -euo pipefail\n" + "\n".join(command.text for command in block)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=desk,
        env=env,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    programs = {command.program[0] for command in block if command.program}
    assert len(block) == 1 or not programs & CODES.keys(), (
        "what follows would not be run"
    )
    allowed = {code for program in programs for code in CODES.get(program, (0,))} or {0}
    assert done.returncode in allowed, (
        f"{place}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )
    assert "Traceback" not in done.stderr


def planned() -> dict[str, Command]:
    """Of the commands that need GPUs, one of each that differ in more than where something lies."""
    places = r" \S*(checkpoint|prompts|run_dir|out|pairs|train|heldout|url)=\S+"
    found = {
        re.sub(places, "", " ".join(command.program)): command
        for command in COMMANDS
        if command.marks and "--config" in command.program
    }
    return {
        f"{command.place} {command.program[0]}": command for command in found.values()
    }


@pytest.mark.parametrize("command", planned().values(), ids=planned())
def test_marked_commands_pass_a_dry_run(
    desk: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --dry-run its config is valid, its modules are built and it fits on 8 H100."""
    program = importlib.import_module(module_of(command.program[0]))
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "argv", [*command.program, "--dry-run", DEVICE])
    with pytest.raises(SystemExit) as end:
        program.main()
    said = capsys.readouterr()
    assert end.value.code in (0, None), said.err[-2000:]
    assert said.out


def test_python_of_the_pages_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    videos = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    for place, text in blocks("python"):
        # Needs films and a reward model: test_examples.py runs it.
        if "DeScoreScorer.load" in text and place.startswith("README.md"):
            continue
        names: dict[str, Any] = {
            "videos": list(videos),
            "prompts": ["a red circle", "rain"],
        }
        exec(compile(text, place, "exec"), names)
        if "my_reward.py" in text:
            red = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)
            red[..., 0] = 255
            assert names["score"](
                torch.cat([red, red.flip(-1)]), ["", ""]
            ).tolist() == [1.0, -1.0]


def test_marked_commands_without_config_are_known() -> None:
    """They are of tools or of runs that are not here, or take too long."""
    left = [
        command.text
        for command in COMMANDS
        if command.marks and "--config" not in command.program
    ]
    others = (
        r"make |launch/nodes/reward_server|sbatch |python3\.1\d -m venv|.*--push"
        r"|(VBENCH_ENV/bin/)?pip |for model in base tuned"
        r"|python launch/(report|diagnose).py runs/wan/"
    )
    assert [text for text in left if not re.match(others, text)] == []
    assert len(unmarked()) >= 8
    assert len(planned()) >= 10
