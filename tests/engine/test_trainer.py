"""The training loop: what a resumed run says about its inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from common import checkpoint
from common.input_record import INPUTS, record_inputs, write_inputs
from engine import trainer
from engine.config import TrainingRun
from engine.trainer import StepReport, TrainingTask


def task_of(inputs: dict[str, Path]) -> TrainingTask:
    return TrainingTask(
        label="test",
        steps=3,
        engine=SimpleNamespace(engine=None),
        step=lambda number: StepReport({}),
        export=lambda: None,
        inputs=record_inputs(inputs),
    )


def test_resumed_run_names_each_input_that_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "load_engine", lambda engine, folder: None)
    monkeypatch.setattr(trainer, "save_engine", lambda engine, folder: None)
    run = TrainingRun(run_dir=str(tmp_path / "run"))
    inputs = {
        "prompts": tmp_path / "prompts.txt",
        "rewards.mine.target": tmp_path / "r.py",
    }
    for file in inputs.values():
        file.write_text("1\n")
    guard = SimpleNamespace(saved=lambda steps_done: None)
    trainer._save(run, task_of(inputs), guard, 2)
    folder = checkpoint.latest(tmp_path / "run" / "checkpoints")

    # Unchanged inputs are not mentioned.
    assert trainer._begin(run, task_of(inputs), "auto") == 2
    assert "another input" not in capsys.readouterr().out
    assert (tmp_path / "run" / INPUTS).read_bytes() == (folder / INPUTS).read_bytes()

    # A replaced file is, by setting and path, and the run goes on.
    inputs["prompts"].write_text("2\n")
    assert trainer._begin(run, task_of(inputs), "auto") == 2
    (line,) = [
        line
        for line in capsys.readouterr().out.split("\n")
        if line.startswith("another input")
    ]
    assert "step-000002" in line
    assert f"prompts ({inputs['prompts']})" in line
    assert "r.py" not in line


def test_checkpoint_without_a_record_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_engine", lambda engine, folder: None)
    (tmp_path / "prompts.txt").write_text("1\n")
    run = TrainingRun(run_dir=str(tmp_path / "run"))
    checkpoint.save(
        tmp_path / "run" / "checkpoints",
        1,
        lambda folder: write_inputs(folder / "..", {}),
        keep=1,
        state={"steps_done": 1},
    )
    task = task_of({"prompts": tmp_path / "prompts.txt"})
    assert trainer._begin(run, task, "auto") == 1
