"""launch/sample.py: names and seeds of videos, killed runs, refused folders."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import launch.compose
from common.distributed import derive_seed
from common.files import read_jsonl
from common.run_record import plain
from engine.guard import locked_folder
from generator.adapter_file import ADAPTER_FILE
from launch import evaluate, pairs, sample
from launch.evaluation.files import find_items
from tests.launch.processes import next_step
from tests.launch.vbench_eval.test_sample import SeedGenerator
from tests.tiny import build_tiny_wan, tiny_config, tiny_generator

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
    return read_jsonl(config.parent / "out" / "samples.jsonl")


def videos(config: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (config.parent / "out").glob("*.mp4")
    }


def test_next_step_of_sample_scores_every_video(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled(config)
    words = next_step(capsys.readouterr().out)
    assert words[:2] == ["python", "launch/score.py"]
    items = find_items(None, Path(words[words.index("--prompts") + 1]))
    assert [item.prompt for item in items] == [p for p in PROMPTS for _ in range(2)]


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_make_no_video(
    grey: SeedGenerator,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    """The videos before are kept; prompt and seed are named."""
    sound = grey.sample

    def sometimes(prompts: list[str], **options: Any) -> torch.Tensor:
        clean = sound(prompts, **options)
        return clean * value if prompts == ["a blue square"] else clean

    monkeypatch.setattr(grey, "sample", sometimes)
    with pytest.raises(SystemExit, match="2"):
        sampled(config)
    assert sorted(videos(config)) == ["0000.mp4", "0001.mp4"]
    message = capsys.readouterr().err
    assert "'a blue square'" in message
    assert str(derive_seed(0, "sample", 1, 0)) in message


# What is done to a sound Wan or adapter, and a word of the line that refuses it.
DAMAGES = {
    "two experts": ("wan", "model_index.json", "two transformers"),
    "lost tensor": ("wan", "text_encoder/model.safetensors", "missing"),
    "nan": ("wan", "vae/diffusion_pytorch_model.safetensors", "NaN"),
    "cut": ("wan", "transformer/diffusion_pytorch_model.safetensors", "whole"),
    "config": ("wan", "transformer/config.json", "not a JSON file"),
    "adapter cut": ("adapter", ADAPTER_FILE, "whole"),
    "adapter nan": ("adapter", ADAPTER_FILE, "NaN"),
    "adapter metadata": ("adapter", ADAPTER_FILE, "no rank and alpha"),
}


def damage(kind: str, file: Path) -> None:
    if kind == "two experts":
        index = json.loads(file.read_text())
        file.write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    elif kind.endswith(("cut", "config")):
        file.write_bytes(file.read_bytes()[:-20])
    else:
        tensors = load_file(file)
        name = sorted(tensors)[-1]
        if kind == "lost tensor":
            tensors.pop(name)
        if kind.endswith("nan"):
            tensors[name].view(-1)[0] = torch.nan
        with safe_open(file, framework="pt") as opened:
            metadata = None if kind.endswith("metadata") else opened.metadata()
        save_file(tensors, file, metadata)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound Wan and an adapter of it."""
    path = tmp_path_factory.mktemp("trained")
    build_tiny_wan(path / "wan")
    tiny_generator(path / "wan").save_trained(path / "adapter")
    return path


@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize("program", ["sample", "evaluate", "pairs", "dry run"])
def test_every_program_refuses_damaged_models_in_a_line(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    program: str,
) -> None:
    """Exit code 2, and the file's name in the last line on the console."""
    part, name, words = DAMAGES[kind]
    if program == "dry run" and kind not in ("two experts", "config"):
        pytest.skip("a dry run reads no weights")
    for folder in ("wan", "adapter"):
        shutil.copytree(trained / folder, tmp_path / folder)
    damage(kind, tmp_path / part / name)
    (tmp_path / "prompts.txt").write_text("rain\n")
    settings = {
        "out": str(tmp_path / "out"),
        "prompts": str(tmp_path / "prompts.txt"),
        "adapter": str(tmp_path / "adapter"),
        "generator": plain(tiny_config(tmp_path / "wan")),
    }
    if program != "sample":
        settings["rewards"] = {"brightness": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    commands = {
        "sample": ([], sample),
        "evaluate": (["generator"], evaluate),
        "pairs": ([], pairs),
        "dry run": (["--dry-run", "1xh100"], pairs),
    }
    words_of, command = commands[program]
    config = ["--config", str(tmp_path / "run.yaml")]
    monkeypatch.setattr(sys, "argv", [program, *words_of, *config])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in last
    assert str(tmp_path / part) in last
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_second_sample_in_a_folder_exits_2(
    grey: SeedGenerator, config: Path, capsys: pytest.CaptureFixture
) -> None:
    with locked_folder(config.parent / "out"), pytest.raises(SystemExit, match="2"):
        sampled(config)
    assert "still going" in capsys.readouterr().err
    assert videos(config) == {}
    # Free again, and the same folder.
    assert len(sampled(config)) == 6
