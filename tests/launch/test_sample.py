"""launch/sample.py: names and seeds of videos, killed runs, refused folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.compose
from common.distributed import derive_seed
from engine.guard import locked_folder
from launch import sample
from launch.evaluation.results_table import read_rows
from tests.launch.vbench_eval.test_sample import SeedGenerator

PROMPTS = ["a red circle", "a blue square", "rain"]


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch) -> SeedGenerator:
    """A generator whose videos are as grey as their seed."""
    generator = SeedGenerator()
    monkeypatch.setattr(launch.compose, "build_generator", lambda cfg: generator)
    return generator


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    generator = {
        "path": "owner/name",
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "fps": 8,
    }
    settings = {
        "out": str(tmp_path / "out"),
        "prompts": str(tmp_path / "prompts.txt"),
        "generator": generator,
    }
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump({**settings, "seeds": 2}))
    return tmp_path / "sample.yaml"


def sampled(config: Path, *words: str) -> list[dict[str, Any]]:
    sample.main(["--local_rank=0", "--config", str(config), *words])
    return read_rows(config.parent / "out" / "samples.jsonl")


def videos(config: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (config.parent / "out").glob("*.mp4")
    }


def test_every_video_has_its_name_and_seed(grey: SeedGenerator, config: Path) -> None:
    rows = sampled(config)
    assert (
        [row["file"] for row in rows]
        == [f"000{i}.mp4" for i in range(6)]
        == sorted(videos(config))
    )
    assert [row["prompt"] for row in rows] == [
        prompt for prompt in PROMPTS for _ in range(2)
    ]
    wanted = [derive_seed(0, "sample", i, k) for i in range(3) for k in range(2)]
    assert [row["seed"] for row in rows] == wanted == [seed for _, seed in grey.seen]
    assert (
        yaml.safe_load((config.parent / "out" / "config.yaml").read_text())["seeds"]
        == 2
    )


def test_a_killed_run_makes_what_is_not_there_and_nothing_twice(
    grey: SeedGenerator, config: Path
) -> None:
    grey.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        sampled(config)
    assert sorted(videos(config)) == ["0000.mp4", "0001.mp4", "0002.mp4"]
    (config.parent / "out" / "0001.mp4").unlink()  # a row without its file
    grey.fail_after = None
    rows = sampled(config)
    seeds = [derive_seed(0, "sample", *divmod(i, 2)) for i in (0, 1, 2, 1, 3, 4, 5)]
    assert [seed for _, seed in grey.seen] == seeds
    broken = videos(config)
    assert sampled(config, "--resume", "none") == rows
    assert len(grey.seen) == 13
    assert videos(config) == broken


def test_a_larger_limit_goes_on_and_a_smaller_one_forgets_nothing(
    grey: SeedGenerator, config: Path
) -> None:
    assert [row["file"] for row in sampled(config, "limit=1")] == [
        "0000.mp4",
        "0001.mp4",
    ]
    rows = sampled(config)
    assert sampled(config, "limit=1") == rows
    assert len(grey.seen) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "holds other results (seed"),
        (["seeds=3"], "holds other results (seeds"),
        (
            ["prompts=nothing.txt"],
            "nothing.txt: cannot be read: No such file or directory",
        ),
        (["adapter=nowhere"], "adapter: there is no folder nowhere"),
        (["seeds=0"], "\n  seeds: "),
    ],
)
def test_what_is_refused_has_exit_code_2_and_a_line(
    grey: SeedGenerator,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    sampled(config, "limit=1")
    with pytest.raises(SystemExit, match="2"):
        sampled(config, *words)
    assert said in capsys.readouterr().err
    assert len(grey.seen) == 2


def test_other_prompts_in_the_same_file_are_other_videos(
    grey: SeedGenerator,
    config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sampled(config, "limit=1")
    (config.parent / "prompts.txt").write_text("snow\n")
    with pytest.raises(SystemExit, match="2"):
        sampled(config)
    assert "holds other results (files.prompts" in capsys.readouterr().err


def test_second_sample_in_a_folder_exits_2(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture
) -> None:
    with locked_folder(config.parent / "out"), pytest.raises(SystemExit, match="2"):
        sampled(config)
    assert "still going" in capsys.readouterr().err
    assert videos(config) == {}
    # Free again, and the same folder.
    assert len(sampled(config)) == 6
