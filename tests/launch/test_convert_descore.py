"""launch/convert_descore.py: its folder loads as a reward model, wrong input exits with code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.config import load
from launch import convert_descore
from launch.schemas.evaluation import RewardEvaluation
from rm.prompt import DEFAULT_TEMPLATE
from rm.scorer import DeScoreScorer
from rm.video import prepare
from tests import official_checkpoint
from tests.launch.processes import loaded_by_help, next_step, run
from tests.tiny_qwen import SETTINGS, random_frames


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return official_checkpoint.write(
        tmp_path / "checkpoint-7", official_checkpoint.train()
    )


def words(tmp_path: Path, *more: str) -> list[str]:
    SETTINGS.save(tmp_path / "video.json")
    paths = {"--official": "checkpoint-7", "--out": "descore", "--video": "video.json"}
    return [
        *(
            word
            for option, name in paths.items()
            for word in (option, str(tmp_path / name))
        ),
        *more,
    ]


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        convert_descore.main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.slow
@torch.no_grad()
def test_converted_folder_gives_the_official_rewards(tmp_path, official):
    prompt = tmp_path / "instruction.txt"
    prompt.write_text("Text: [insert prompt here]\nVideo: <video>\nJudge it.")
    options = ("--allow-pickle", "--prompt", str(prompt))
    done = run(sys.executable, "launch/convert_descore.py", *words(tmp_path, *options))
    assert " 14 " in done.stdout
    assert str(official / "rm_head.pth") in done.stdout
    assert str(prompt) in done.stdout
    scorer = DeScoreScorer.load(tmp_path / "descore", device="cpu", cots=0)
    model = scorer.model
    text = "Text: a cat\nVideo: "
    assert model.template.fill("a cat") == text
    videos = [random_frames(i) for i in range(2)]
    found = scorer.score(videos, ["a cat", "a dog"], fps=4.0).value_B

    # The official model on the same tokens.
    ready = [prepare(video, SETTINGS, fps=4.0) for video in videos]
    batch = model.batch(
        [model.encode(p, v) for p, v in zip(["a cat", "a dog"], ready, strict=True)],
        ready,
    )
    torch.testing.assert_close(
        found.double(), official_checkpoint.train().reward(batch), atol=1e-5, rtol=0
    )


def test_pickle_without_allow_pickle_is_refused_and_writes_nothing(
    tmp_path, official, capsys
):
    message = refused(capsys, *words(tmp_path))
    assert "rm_head.pth" in message
    assert "--allow-pickle" in message
    assert "Traceback" not in message
    assert not (tmp_path / "descore").exists()


def test_safetensors_head_needs_no_flag_and_default_prompt_is_reported(
    tmp_path, official, capsys
):
    save_file(
        {"rm_head.weight": official_checkpoint.train().head_1D},
        tmp_path / "head.safetensors",
    )
    convert_descore.main(
        words(
            tmp_path,
            "--head",
            str(tmp_path / "head.safetensors"),
            "--dtype",
            "bfloat16",
        )
    )
    printed = capsys.readouterr().out
    assert "NOT" in printed
    _, program, kind, _, recipe, *overrides = next_step(printed)
    assert (program, kind) == ("launch/evaluate.py", "rm")
    run = load(RewardEvaluation, recipe, overrides)
    assert run.checkpoint == str(tmp_path / "descore")
    model = DeScoreScorer.load(tmp_path / "descore", device="cpu").model
    assert model.template == DEFAULT_TEMPLATE
    with safe_open(tmp_path / "descore/model.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_wrong_input_exits_2(tmp_path, official, capsys):
    (tmp_path / "descore").mkdir()
    (tmp_path / "descore/mine.txt").touch()
    assert "descore" in refused(capsys, *words(tmp_path, "--allow-pickle"))
    (tmp_path / "descore/mine.txt").unlink()
    assert "--no-lora" in refused(
        capsys, *words(tmp_path, "--allow-pickle", "--no-lora")
    )
    assert "x.pth" in refused(
        capsys, *words(tmp_path, "--head", str(tmp_path / "x.pth"))
    )
    (tmp_path / "video.json").write_text("{}")
    assert "x.txt" in refused(
        capsys, *words(tmp_path, "--prompt", str(tmp_path / "x.txt"))
    )


def test_help_imports_nothing_heavy():
    loaded, said = loaded_by_help(
        "convert_descore", "torch", "transformers", "peft", "safetensors"
    )
    assert loaded == []
    assert "--allow-pickle" in said
