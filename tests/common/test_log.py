from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from common.config import WandbConfig
from common.log import RunLog, progress, read_metrics, say
from common.video_io import write_mp4

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_is_a_line_of_strict_json(tmp_path):
    log = RunLog(tmp_path / "run")
    log.log(0, {"train/loss": 0.5, "reward/descore": math.nan})
    log.log(1, {"train/loss": 0.25, "reward/descore": math.inf})
    lines = log.path.read_text().splitlines()
    assert lines[0] == '{"step": 0, "train/loss": 0.5, "reward/descore": null}'
    assert json.loads(lines[1]) == {
        "step": 1,
        "train/loss": 0.25,
        "reward/descore": None,
    }
    rows = read_metrics(log.path)
    assert [row["train/loss"] for row in rows] == [0.5, 0.25]
    assert all(math.isnan(row["reward/descore"]) for row in rows)


def test_resume_rewrites_what_the_killed_run_left(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.log(step, {"x": float(step)})
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write('{"step": 5, "x"')  # the kill came in the middle of a line
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, 3, 4]
    log = RunLog(tmp_path, start=3)
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2]
    for step in (3, 4):
        log.log(step, {"x": float(step)})
    assert log.path.read_text() == whole
    RunLog(tmp_path / "fresh", start=3)  # nothing to drop is no error


def test_console_lines_are_aligned_and_fit(tmp_path, capsys):
    log = RunLog(tmp_path, total=100)
    for step, scale in ((0, 1.0), (99, -12345.678)):
        log.log(step, {f"stage/metric{i}": scale / (i + 1) for i in range(12)})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step    1/100 | stage/metric0          1 |")
    assert [i for i, c in enumerate(first) if c == "|"] == [
        i for i, c in enumerate(second) if c == "|"
    ]
    assert max(len(first), len(second)) < 120
    assert len(read_metrics(log.path)[0]) == 13


def test_evaluation_metrics_get_a_separate_line(tmp_path, capsys):
    log = RunLog(tmp_path, total=100)
    log.log(
        9,
        {**{f"stage/metric{i}": 1.0 for i in range(12)}, "heldout/accuracy": 0.75},
        measured_after=9,
    )
    log.log(100, {"eval/oracle": 0.5}, measured_after=100)
    lines = capsys.readouterr().out.splitlines()
    # The tenth step, and what was measured after the nine before it.
    assert lines[0].startswith("step   10/100")
    assert [row["step"] for row in read_metrics(log.path)] == [9, 100]
    assert lines[1:] == [
        "step    9/100 | heldout/accuracy       0.75",
        "step  100/100 | eval/oracle        0.5",
    ]
    assert "heldout" not in lines[0]


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path / "run", wandb=WandbConfig("offline"))
    log.log(0, {"x": 1.0})
    log.videos(0, [], [])
    log.close()
    assert list(progress(range(3), 3, "steps")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not (tmp_path / "run").exists()


def test_progress_shows_the_label_and_passes_items(capsys):
    assert list(progress([4, 5], 2, "decoding")) == [4, 5]
    assert "decoding" in capsys.readouterr().err


def test_progress_in_a_log_file_is_plain_lines(capsys, monkeypatch):
    """30 s an item: after the first of four 90 s are left. 5 s after a line comes none."""
    now = iter([0.0, 30.0, 60.0, 65.0, 120.0])
    monkeypatch.setattr("common.log.time.monotonic", lambda: next(now))
    assert list(progress("abcd", 4, "scored")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "scored: 1 of 4, 0:30, about 1:30 left",
        "scored: 2 of 4, 1:00, about 1:00 left",
        "scored: 4 of 4, 2:00",
    ]


def test_progress_on_a_terminal_is_a_bar_and_elsewhere_has_no_control_characters(
    capsys, monkeypatch
):
    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda on=is_terminal: on)
        list(progress([1, 2], 2, "grpo", describe=lambda: "rollout"))
        err = capsys.readouterr().err
        assert ("\r" in err) == is_terminal
        assert "2" in err


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

    def Video(self, path: str, **about: str) -> tuple[str, str]:
        return path, about["caption"]


@pytest.mark.parametrize(
    ("broken", "calls"),
    [("", "init log log finish"), ("init", "init"), ("log", "init log")],
)
def test_wandb_failure_is_reported_once(tmp_path, monkeypatch, capsys, broken, calls):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, wandb=WandbConfig("online", "p", "n"))
    log.log(0, {"x": 1.0})
    log.log(1, {"x": 2.0})
    log.close()
    assert [name for name, *_ in fake.calls] == calls.split()
    want = {
        "dir": str(tmp_path),
        "mode": "online",
        "project": "p",
        "name": "n",
        "resume": "allow",
        "config": None,
    }
    assert fake.calls[0][2] == {
        **want,
        "id": json.loads((tmp_path / "wandb.json").read_text())["id"],
    }
    assert capsys.readouterr().out.count("no network") == bool(broken)
    assert [row["x"] for row in read_metrics(log.path)] == [1.0, 2.0]


def test_resumed_run_keeps_wandb_id(tmp_path, monkeypatch):
    """Its config without secrets, its id from the folder; started over it is another one."""
    (tmp_path / "config.yaml").write_text("steps: 3\ntoken: '***'\n")
    told = []
    for start in (0, 2, 0):
        fake = FakeWandb("")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        log = RunLog(tmp_path, start=start, wandb=WandbConfig("offline"))
        log.videos(7, [Path("a.mp4"), Path("b.mp4")], ["a dog", "a cat"])
        log.close()
        told.append(fake.calls[0][2])
        assert fake.calls[1][1:] == (
            ({"samples": [("a.mp4", "a dog"), ("b.mp4", "a cat")]},),
            {"step": 7},
        )
    first, again, over = (one["id"] for one in told)
    assert first == again != over
    assert told[0]["config"] == {"steps": 3, "token": "***"}


class FakeBoard(types.ModuleType):
    """Stands for torch.utils.tensorboard."""

    def __init__(self, *, full: bool = False) -> None:
        super().__init__("torch.utils.tensorboard")
        self.said, self.full = [], full

    def SummaryWriter(self, folder: str, purge_step: int) -> FakeBoard:
        self.said.append((Path(folder).name, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.full:
            raise OSError("no space left")
        self.said.append((name, value, step))

    def close(self) -> None:
        self.said.append("closed")


@pytest.mark.parametrize("full", [False, True])
def test_tensorboard_and_wandb_fail_independently(tmp_path, monkeypatch, capsys, full):
    board, fake = FakeBoard(full=full), FakeWandb("")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, start=4, wandb=WandbConfig("online"), tensorboard=True)
    log.log(4, {"train/loss": 0.5})
    log.log(5, {"train/loss": 0.25})
    log.close()
    assert [name for name, *_ in fake.calls] == ["init", "log", "log", "finish"]
    if full:
        assert board.said == [("tensorboard", 4)]
        assert capsys.readouterr().out.count("tensorboard log") == 1
    else:
        assert board.said == [
            ("tensorboard", 4),
            ("train/loss", 0.5, 4),
            ("train/loss", 0.25, 5),
            "closed",
        ]


def test_missing_tensorboard_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunLog(tmp_path, tensorboard=True).close()
    assert "tensorboard" in capsys.readouterr().out


def test_missing_wandb_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    RunLog(tmp_path, wandb=WandbConfig("offline")).close()
    assert "wandb" in capsys.readouterr().out


def test_disabled_wandb_is_not_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(tmp_path, wandb=WandbConfig()).close()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_real_wandb_works_offline(tmp_path, capsys):
    write_mp4(tmp_path / "a.mp4", torch.zeros(4, 16, 16, 3, dtype=torch.uint8), 8.0)
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    for start in (0, 1):
        log = RunLog(tmp_path, start=start, wandb=WandbConfig("offline"))
        log.log(start, {"x": 1.0})
        log.videos(start, [tmp_path / "a.mp4"], ["a dog"])
        log.close()
    assert "without" not in capsys.readouterr().out
    runs = {path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert runs == {f"run-{json.loads((tmp_path / 'wandb.json').read_text())['id']}"}
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/videos/*.mp4"))


def test_say_is_flushed_and_needs_no_torch():
    program = (
        "import sys; from common.log import say; say('hello'); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_say_prints_a_line(capsys):
    say("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 40, b"{}", b"[1]", b"7", b"{", b'{"step": "x"}', b"\xff", b"[" * 100_000],
)
def test_damaged_line_of_the_metrics_is_left_out(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + damage + b'\n{"step": 1}\n{"step": 2}\n')
    RunLog(tmp_path, start=2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert "1 damaged" in capsys.readouterr().out


def test_progress_tells_where_a_long_item_is(capsys, monkeypatch):
    monkeypatch.setattr("common.log.DESCRIBE_S", 0.02)
    for _ in progress([1], 1, "grpo", describe=lambda: "rollout 3 of 8"):
        time.sleep(0.2)
    assert "grpo: rollout 3 of 8\n" in capsys.readouterr().out
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_tensorboard_reads_a_resumed_run(tmp_path):
    """Its own reader sees every step once: steps 1 and 2 of the resumed run, not of the killed."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for start, scale in ((0, 1.0), (1, 10.0)):
        log = RunLog(tmp_path, start=start, tensorboard=True)
        for step in range(start, 3):
            log.log(step, {"train/loss": scale * step, "reward/mine": 0.5})
        log.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "reward/mine"}
    loss = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert loss == [(0, 0.0), (1, 10.0), (2, 20.0)]


@pytest.mark.slow
def test_wandb_reads_the_offline_folders_of_a_resumed_run(tmp_path):
    """Its own reader finds each session's metrics and the id that joins them when they are sent."""
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    for step, loss in ((0, 0.5), (1, 0.25)):
        log = RunLog(tmp_path, start=step, wandb=WandbConfig("offline"))
        log.log(step, {"train/loss": loss})
        log.close()
    found = {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        words = ["-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if "No such command" in done.stderr:
            pytest.skip("this wandb has no reader of its own without a network")
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (run,) = [record["run"] for record in records if record["type"] == "run"]
        (row,) = [
            record["history"] for record in records if record["type"] == "history"
        ]
        found[row["item"]["_step"]] = (run["run_id"], row["item"]["train/loss"])
    joined = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert found == {0: (joined, 0.5), 1: (joined, 0.25)}
