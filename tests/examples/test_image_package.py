"""A generator that is not Wan, in a package that offers it by an entry point."""

from __future__ import annotations

import os
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from common.log import read_metrics
from tests.launch.processes import ROOT, run

PACKAGE = ROOT / "examples" / "image_package"
WORDS = (
    "generator.target=tiny_image",
    "generator.num_frames=1",
    "generator.height=16",
    "generator.width=16",
    "rewards.oracle=null",
    "rewards.warm.target=examples/my_reward.py:score",
    "prompts_per_step=2",
    "evaluation.every=1",
    "evaluation.limit=2",
    "save_every=1",
    "video_every=1",
)


def installed(folder: Path) -> str:
    """Make what pip writes of the package's entry points; return the path to import from."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / "tiny_image-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: 0.1\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return os.pathsep.join(map(str, (ROOT, folder, PACKAGE)))


@pytest.mark.long
def test_images_of_a_package_go_through_the_commands(tmp_path: Path) -> None:
    """Two updates with a resume between them, report, samples, and plain refusals."""
    path = installed(tmp_path / "site")
    folder = tmp_path / "run"

    def command(*words: str, expect: int = 0) -> str:
        done = run(sys.executable, *words, expect=expect, PYTHONPATH=path)
        return done.stdout + done.stderr

    grpo = ("launch/grpo.py", "--config", "configs/shapes/grpo_oracle.yaml", *WORDS)
    assert "self-check ok: first ratio" in command(
        *grpo, f"run_dir={folder}", "steps=1"
    )
    out = command(*grpo, f"run_dir={folder}", "steps=2")
    assert "going on after 1 steps" in out
    assert "are not repeated" in out
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    # the LoRA has moved what is sampled at the same seeds
    assert rows[0]["eval/warm"] != rows[2]["eval/warm"]
    assert rows[0]["train/kl"] == 0.0 < rows[1]["train/kl"]

    # The command that the last line names works as it stands.
    sample = out.rpartition("then python ")[2].splitlines()[0]
    command(*shlex.split(sample), "limit=1")
    assert (folder / "videos" / "0000.mp4").is_file()
    command("launch/report.py", str(folder), "--out", str(folder / "report.html"))

    # What knows Wan only says so.
    words = ["--format", "diffusers", "--out", str(tmp_path / "out")]
    said = command("launch/export.py", str(folder / "final"), *words, expect=2)
    assert "was trained with generator.target=tiny_image" in said
    planned = command(*grpo, "--dry-run")
    assert "a plan knows Wan only" in planned
    assert "one update = " in planned
