from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest

from common.config import WandbConfig
from common.log import RunLog, progress, read_metrics, say

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_is_a_line_of_strict_json(tmp_path):
    log = RunLog(tmp_path / "run", quiet=True)
    log.log(0, {"train/loss": 0.5, "reward/descore": math.nan})
    log.log(1, {"train/loss": 0.25, "reward/descore": math.inf})
    lines = log.path.read_text().splitlines()
    assert lines[0] == '{"step": 0, "train/loss": 0.5, "reward/descore": null}'
    assert json.loads(lines[1]) == {"step": 1, "train/loss": 0.25, "reward/descore": None}
    rows = read_metrics(log.path)
    assert [row["train/loss"] for row in rows] == [0.5, 0.25]
    assert all(math.isnan(row["reward/descore"]) for row in rows)


def test_resume_rewrites_what_the_killed_run_left(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    for step in range(5):
        log.log(step, {"x": float(step)})
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write('{"step": 5, "x"')  # the kill came in the middle of a line
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, 3, 4]
    log.truncate(3)
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2]
    for step in (3, 4):
        log.log(step, {"x": float(step)})
    assert log.path.read_text() == whole
    RunLog(tmp_path / "fresh").truncate(3)  # nothing to drop is no error


def test_console_lines_are_aligned_and_fit(tmp_path, capsys):
    log = RunLog(tmp_path, total=100)
    for step, scale in ((1, 1.0), (100, -12345.678)):
        log.log(step, {f"stage/metric{i}": scale / (i + 1) for i in range(12)})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step    1/100 | stage/metric0          1 |")
    assert [i for i, c in enumerate(first) if c == "|"] == [i for i, c in enumerate(second) if c == "|"]
    assert max(len(first), len(second)) < 120
    assert len(read_metrics(log.path)[0]) == 13


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path / "run", wandb=WandbConfig("offline"))
    log.log(0, {"x": 1.0})
    log.truncate(0)
    log.message("hello")
    log.close()
    assert list(progress(range(3), 3, "steps")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not (tmp_path / "run").exists()


def test_progress_shows_the_label_and_passes_items(capsys):
    assert list(progress([4, 5], 2, "decoding")) == [4, 5]
    assert "decoding" in capsys.readouterr().err


class FakeWandb(types.ModuleType):
    """Stands for the wandb module; ``broken`` names the call that fails."""

    def __init__(self, broken: str) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.broken, self.calls = broken, []

    def _call(self, what: str, /, *args, **kwargs) -> None:
        self.calls.append((what, args, kwargs))
        if what == self.broken:
            raise self.errors.Error("no network")

    def init(self, **kwargs) -> None:
        self._call("init", **kwargs)

    def log(self, *args, **kwargs) -> None:
        self._call("log", *args, **kwargs)

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize(("broken", "calls"), [("", "init log log finish"), ("init", "init"), ("log", "init log")])
def test_a_wandb_failure_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, broken, calls):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, wandb=WandbConfig("online", "p", "n"), quiet=True)
    log.log(0, {"x": 1.0})
    log.log(1, {"x": 2.0})
    log.close()
    assert [name for name, *_ in fake.calls] == calls.split()
    assert fake.calls[0][2] == {"dir": str(tmp_path), "mode": "online", "project": "p", "name": "n"}
    assert capsys.readouterr().out.count("no network") == bool(broken)
    assert [row["x"] for row in read_metrics(log.path)] == [1.0, 2.0]


def test_no_wandb_installed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    RunLog(tmp_path, wandb=WandbConfig("offline")).close()
    assert "goes on without it" in capsys.readouterr().out


def test_disabled_wandb_is_not_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(tmp_path, wandb=WandbConfig()).close()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_real_wandb_works_offline(tmp_path, capsys):
    log = RunLog(tmp_path, wandb=WandbConfig("offline"), quiet=True)
    log.log(0, {"x": 1.0})
    log.close()
    assert "goes on without it" not in capsys.readouterr().out
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_say_is_flushed_and_needs_no_torch():
    program = "import sys; from common.log import say; say('hello'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_say_prints_a_line(capsys):
    say("hello")
    assert capsys.readouterr().out == "hello\n"
