"""launch/sample.py vbench: names, seeds, ranks, and runs that are started again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import common.video_io
import launch.compose
from common.distributed import derive_seed
from common.files import read_jsonl
from launch import sample
from launch.command import take_kind
from tests.launch.processes import ROOT, torchrun
from tests.launch.vbench_eval.test_suite import write_info

ENTRIES = [
    ("a still frame", ["temporal_flickering"]),
    ("two cats, oil painting", ["appearance_style"]),
    ("façades. At dusk", ["scene", "background_consistency"]),
    (
        "two cats, oil painting",
        ["overall_consistency", "aesthetic_quality", "imaging_quality"],
    ),
]
NAMES = [
    *(f"a still frame-{i}.mp4" for i in range(3)),
    *(f"two cats, oil painting-{i}.mp4" for i in range(2)),
    *(f"façades. At dusk-{i}.mp4" for i in range(2)),
]


class SeedGenerator:
    """The video of a seed is uniformly grey, seed % 200."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.fail_after: int | None = None

    def load_trained(self, folder: str) -> None:
        pass

    def sample(
        self, prompts: Sequence[str], *, seeds: Sequence[int], scheduler: str
    ) -> Tensor:
        assert len(prompts) == len(seeds) == 1, (
            "in a batch, rounding would depend on the neighbours"
        )
        if self.fail_after == len(self.seen):
            raise KeyboardInterrupt
        self.seen.append((prompts[0], seeds[0]))
        return torch.tensor([float(seeds[0] % 200)]).view(1, 1, 1, 1, 1)

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        return clean_BCFHW.to(torch.uint8).expand(-1, 5, 16, 16, 3)


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch) -> SeedGenerator:
    generator = SeedGenerator()
    monkeypatch.setattr(launch.compose, "build_generator", lambda cfg: generator)
    return generator


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Three prompts in four entries; two videos each, three of temporal_flickering."""
    settings = {
        "out": str(tmp_path / "out"),
        "info": str(write_info(tmp_path / "info.json", ENTRIES)),
        "generator": {
            "path": "owner/name",
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "fps": 8,
        },
        "videos": 2,
        "flickering": 3,
    }
    (tmp_path / "vbench.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "vbench.yaml"


def sampled(config: Path, *words: str) -> list[dict[str, Any]]:
    """The rows in config.parent/out, wherever the words have it go."""
    sample.main(["--local_rank=0", "vbench", "--config", str(config), *words])
    path = config.parent / "out" / "samples.jsonl"
    return read_jsonl(path) if path.exists() else []


def contents(config: Path, out: str = "out") -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (config.parent / out / "videos").iterdir()
    }


def test_every_video_has_its_name_and_seed_and_nothing_lies_beside(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sampled(config)
    assert sorted(contents(config)) == sorted(NAMES)
    assert [row["file"] for row in rows] == NAMES
    wanted = [
        (name[:-6], derive_seed(0, "vbench", name[:-6], int(name[-5])))
        for name in NAMES
    ]
    assert grey.seen == wanted
    assert len({seed for _, seed in wanted}) == 7
    assert [(row["prompt"], row["seed"], row["text"]) for row in rows] == [
        (p, s, p) for p, s in wanted
    ]
    assert not (config.parent / "out" / "partial.rank-0.mp4").exists()
    assert ": 3 prompts, 7 videos, 7 to make" in capsys.readouterr().out


def test_a_killed_run_makes_what_is_not_there_and_nothing_twice(
    grey: SeedGenerator, config: Path
) -> None:
    grey.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        sampled(config)
    assert sorted(contents(config)) == sorted(NAMES[:3])
    folder = config.parent / "out" / "videos"
    (folder / NAMES[1]).unlink()  # a row without its file
    (folder / NAMES[4]).write_bytes(b"of another run, without a row")
    (config.parent / "out" / "partial.rank-0.mp4").write_bytes(b"half a vi")
    grey.fail_after = None
    rows = sampled(config)
    order = [NAMES[i] for i in (0, 1, 2, 1, 3, 4, 5, 6)]
    assert [seed for _, seed in grey.seen] == [
        derive_seed(0, "vbench", n[:-6], int(n[-5])) for n in order
    ]
    assert [row["file"] for row in rows] == NAMES
    broken = contents(config)
    sampled(config)
    assert len(grey.seen) == 8
    sampled(config, "--resume", "none")
    assert len(grey.seen) == 15
    assert contents(config) == broken


def test_more_dimensions_keep_what_fewer_made(
    grey: SeedGenerator, config: Path
) -> None:
    assert [row["file"] for row in sampled(config, "dimensions=[scene]")] == NAMES[5:]
    assert [row["file"] for row in sampled(config, "limit=1")] == [
        *NAMES[:3],
        *NAMES[5:],
    ]
    assert [row["file"] for row in sampled(config)] == NAMES
    assert len(grey.seen) == 7


def test_rewritten_prompts_are_read_and_files_keep_their_names(
    grey: SeedGenerator, config: Path
) -> None:
    lines = [
        {"prompt": prompt, "augmented": f"{prompt}, in detail"}
        for prompt in {prompt for prompt, _ in ENTRIES}
    ]
    path = config.parent / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = sampled(config, f"augmented={path}")
    assert [row["file"] for row in rows] == NAMES
    assert [text for text, _ in grey.seen] == [
        f"{name[:-6]}, in detail" for name in NAMES
    ]
    assert rows[0]["seed"] == derive_seed(
        0, "vbench", "a still frame", 0
    )  # as without them


@pytest.mark.parametrize(
    "change", ["seed=1", "scheduler=pipeline", "generator.sampler.num_steps=9"]
)
def test_videos_of_two_configurations_never_mix(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    sampled(config, "limit=1")
    with pytest.raises(SystemExit, match="2"):
        sampled(config, change)
    assert "holds other results" in capsys.readouterr().err


def test_another_kind_of_file_among_the_videos_is_refused(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "out" / "videos").mkdir(parents=True)
    (config.parent / "out" / "videos" / "notes.txt").write_text("")
    with pytest.raises(SystemExit, match="2"):
        sampled(config)
    assert "'notes.txt'" in capsys.readouterr().err
    assert grey.seen == []


def test_half_a_video_never_lies_among_the_whole_ones(
    grey: SeedGenerator, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any name: VBench would take it for the last of them, or its ending for theirs."""

    def write_half(path: Path, video_TYXC: Tensor, fps: float, *, crf: int) -> None:
        path.write_bytes(b"half a vi")
        raise KeyboardInterrupt

    monkeypatch.setattr(common.video_io, "write_mp4", write_half)
    with pytest.raises(KeyboardInterrupt):
        sampled(config)
    assert contents(config) == {}
    assert list(config.parent.rglob("*.mp4")) != []


def test_the_word_is_not_the_value_of_an_option() -> None:
    words = ["--local_rank=0", "--config", "vbench", "vbench", "out=x"]
    assert take_kind(words, ["vbench"]) == "vbench"
    assert words == ["--local_rank=0", "--config", "vbench", "out=x"]
    assert take_kind(words, ["vbench"]) is None


@pytest.mark.slow
def test_two_ranks_share_the_videos(grey: SeedGenerator, config: Path) -> None:
    done = torchrun(
        2,
        str(ROOT / "tests" / "launch" / "vbench_eval" / "vbench_ranks.py"),
        "--config",
        str(config),
    )
    assert sorted(line for line in done.stdout.splitlines() if "sampled" in line) == [
        "sampled 3",
        "sampled 4",
    ]
    two = contents(config)
    assert [
        row["file"] for row in read_jsonl(config.parent / "out" / "samples.jsonl")
    ] == NAMES
    sampled(config, f"out={config.parent / 'one'}")
    assert contents(config, "one") == two


def test_a_mistake_is_exit_2_and_names_the_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["vbench", "--config", str(config), "flickering=0"]
    words.append("dimensions=[color,colour]")
    with pytest.raises(SystemExit, match="2"):
        sample.main([*words, "vidoes=3"])
    assert "did you mean 'videos'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sample.main(words)
    message = capsys.readouterr().err
    assert "VBench has no 'colour'" in message
    assert "flickering" in message


@pytest.mark.long
def test_ranks_and_kills_change_no_bit_of_the_tiny_wan(
    config: Path, tmp_path: Path
) -> None:
    """A run of one rank equals a run that two ranks continue after a lost video."""
    from tests.tiny import build_tiny_wan

    settings = yaml.safe_load(config.read_text())
    settings["generator"] |= {
        "path": str(build_tiny_wan(tmp_path / "wan")),
        "dtype": "float32",
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "lora": {"rank": 4, "alpha": 8},
        "max_sequence_length": 24,
        "sampler": {"num_steps": 3, "stochastic_range": 2},
    }
    config.write_text(yaml.safe_dump(settings | {"scheduler": "pipeline"}))
    sampled(config, f"out={tmp_path / 'one'}")
    sampled(config, f"out={tmp_path / 'mixed'}", "limit=1")
    (tmp_path / "mixed" / "videos" / NAMES[1]).unlink()
    script = str(ROOT / "launch" / "sample.py")
    torchrun(2, script, "vbench", "--config", str(config), f"out={tmp_path / 'mixed'}")
    one = contents(config, "one")
    assert sorted(one) == sorted(NAMES)
    assert len(set(one.values())) == 7
    assert contents(config, "mixed") == one
    assert (tmp_path / "mixed" / "samples.jsonl").read_bytes() == (
        tmp_path / "one" / "samples.jsonl"
    ).read_bytes()
