"""`report.py --watch` writes the page until the runs end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from common.files import read_jsonl
from launch import report
from tests.launch.reporting.pages import alignment_run, lines


@pytest.fixture
def started(tmp_path: Path, plain_charts: None) -> tuple[Path, list[dict[str, float]]]:
    """A run after ten steps of forty, and its later rows."""
    folder = alignment_run(tmp_path / "run")
    with (folder / "config.yaml").open("a") as config:
        config.write("steps: 40\n")
    rows = read_jsonl(folder / "metrics.jsonl")
    lines(folder / "metrics.jsonl", rows[:10])
    return folder, rows


def progress(folder: Path) -> tuple[str, bool]:
    """Step that the page names, and whether it loads itself again."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    return re.search(r"step \d+ of 40", text)[0], "data-refresh" in text


def test_page_follows_a_run_until_it_ends(
    started: tuple[Path, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = started
    seen = []
    waits = []

    def train(seconds: float) -> None:
        """Ten steps pass while the command waits; the third time the run ends."""
        waits.append(seconds)
        seen.append(progress(folder))
        lines(folder / "metrics.jsonl", rows[: 10 + 10 * len(waits)])
        if len(waits) == 3:
            (folder / "final").mkdir()

    monkeypatch.setattr(time, "sleep", train)
    report.main([str(folder), "--watch", "--every", "7"])
    assert waits == [7.0] * 3
    assert seen == [(f"step {n} of 40", True) for n in (10, 20, 30)]
    assert progress(folder) == ("step 40 of 40", False)


def test_file_that_is_being_written_does_not_end_the_watch(
    started: tuple[Path, list],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The page of before stays while config.yaml is half written; Ctrl-C ends."""
    folder, _ = started
    whole = (folder / "config.yaml").read_text()
    texts = iter(["rewards: [", whole])

    def break_and_mend(seconds: float) -> None:
        text = next(texts, None)
        if text is None:
            raise KeyboardInterrupt
        assert progress(folder) == ("step 10 of 40", True)
        (folder / "config.yaml").write_text(text)

    monkeypatch.setattr(time, "sleep", break_and_mend)
    report.main([str(folder), "--watch"])
    said = capsys.readouterr()
    assert said.err.count("not written this time") == 1
    assert "config.yaml" in said.err
    assert progress(folder) == ("step 10 of 40", False)


def test_too_short_a_pause_exits_2(started: tuple[Path, list]) -> None:
    with pytest.raises(SystemExit) as exit_:
        report.main([str(started[0]), "--watch", "--every", "0"])
    assert exit_.value.code == 2
