"""The page that compares runs: settings that differ, results, curves and videos side by side."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.files import read_jsonl
from launch import report
from launch.reporting import peers, texts
from tests.launch.reporting.pages import (
    BASE,
    TUNED,
    Page,
    alignment_run,
    clip,
    evaluation,
    lines,
)

CONFIG = """grpo: {kl_weight: %s}
run_dir: %s
steps: 60
optimizer: {lr: 0.001, betas: [0.9, 0.99]}
rewards:
  descore: {weight: 1.0}
  shapes: {weight: 0}
"""


@pytest.fixture(autouse=True)
def _plain_charts(plain_charts: None) -> None:
    """Leave out the drawings."""


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two GRPO runs; the second has half of the reward, another KL weight and fewer samples."""
    first = alignment_run(tmp_path / "a" / "grpo")
    second = alignment_run(tmp_path / "b" / "grpo")
    (first / "config.yaml").write_text(CONFIG % (0.01, first))
    (second / "config.yaml").write_text(
        CONFIG % (0.02, second) + "ema: {decay: 0.9, note: null}\n"
    )
    rows = read_jsonl(second / "metrics.jsonl")
    lines(
        second / "metrics.jsonl",
        [{**row, "reward/shapes": row["reward/shapes"] / 2} for row in rows[:30]],
    )
    for file in sorted((second / "samples" / "step-000039").iterdir()):
        file.unlink()
    return first, second


def compared(folders: list[Path], out: Path) -> tuple[str, Page]:
    report.main([*map(str, folders), "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_only_settings_that_differ_are_listed(two_runs: tuple[Path, Path]) -> None:
    (table,) = peers.setting_tables(peers.find_peers(two_runs))
    assert table.rows == [
        ("grpo.kl_weight", ["0.01", "0.02"]),
        ("ema.decay", [peers.NOTHING, "0.9"]),
    ]


def test_settings_are_flattened_by_keys_with_dots() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, {"f": "x"}], "g": {}}
    assert peers.flat_settings(nested) == {
        "a.b": "1",
        "a.c.d": "null",
        "e": '[1, {"f": "x"}]',
        "g": "{}",
    }


def test_rewards_of_runs_are_means_of_the_last_tenth(
    two_runs: tuple[Path, Path],
) -> None:
    """Rewards are 0.1 step: steps 36 to 39 have mean 3.75; half of steps 27 to 29, 1.4."""
    table = peers.reward_table(peers.find_peers(two_runs))
    rows = dict(table.rows)
    assert rows.keys() == {"reward/descore", "reward/shapes"}
    assert rows["reward/shapes"] == pytest.approx([3.75, 1.4])


def test_every_curve_of_a_run_has_the_colour_of_the_run(
    two_runs: tuple[Path, Path],
) -> None:
    found = peers.find_peers(two_runs)
    ((kind, charts),) = peers.peer_charts(found)
    assert kind == "grpo"
    by_title = {chart.title: chart for chart in charts}
    legend = by_title["Reward: shapes (watched only)"].legend
    assert [(curve.name, curve.color) for curve in legend] == [
        (peer.name, peer.color) for peer in found
    ]
    assert [len(curve.y) for curve in legend] == [40, 30]
    # a chart of several metrics is one of each metric
    assert "Spread of descore (trained, weight 1): all rollouts" in by_title


def test_videos_stand_beside_each_other_at_equal_seeds(
    two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Both runs sampled three members at step 0; step 39 has samples of one run only."""
    first, second = two_runs
    text, page = compared([first, second], tmp_path / "out.html")
    assert "Report of a/grpo, b/grpo" in page.text
    assert re.findall(r"seed 3, member (\d)", page.text) == ["0", "1", "2"]
    assert [t for t, _ in page.tags].count("video") == 6
    assert "Step 0" in page.text
    assert "Step 39" not in page.text
    assert "step 40 of 60" in page.text
    assert "step 30 of 60" in page.text
    assert str(tmp_path) not in text


def test_heldout_prompts_are_compared_at_every_common_step(
    two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for run in two_runs:
        for step in (0, 20, 40):
            folder = run / "evaluation" / f"step-{step:06d}"
            rows = [
                {"file": "0000.mp4", "prompt": "held out", "seed": 5, "rewards": {}}
            ]
            lines(folder / "samples.jsonl", rows)
            clip(folder / "0000.mp4", step)
    _, page = compared(list(two_runs), tmp_path / "out.html")
    assert page.text.count("held out") == 3
    assert [t for t, _ in page.tags].count("video") == 6 + 6


def test_evaluations_are_compared_with_the_first(tmp_path: Path) -> None:
    """0.2 0.4 0.6 0.4 against 0.5 0.6 0.7 0.8: the mean change is 0.25."""
    folders = [
        evaluation(tmp_path / "one", BASE),
        evaluation(tmp_path / "two", TUNED, adapter="x/grpo/final"),
    ]
    (table,) = peers.evaluation_tables(peers.find_peers(folders))
    (first, none), (second, change) = dict(table.rows)["shapes"]
    assert none is None
    assert first["mean"] == pytest.approx(0.4)
    assert second["mean"] == pytest.approx(0.65)
    assert change["mean"] == pytest.approx(0.25)
    _, page = compared(folders, tmp_path / "out.html")
    assert "prompt number 1" in page.text
    # the adapter differs, and tells the runs apart
    assert "adapter" in page.text


def test_what_cannot_be_compared_exits_2(
    two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, two_runs)
    for words in (
        [first, first],
        [first, str(tmp_path / "nowhere")],
        [first, second, "--grpo", first],
        [first, second, *(f"{first}{i}" for i in range(5))],
    ):
        with pytest.raises(SystemExit) as exit_:
            report.main([*words, "--out", str(tmp_path / "r.html")])
        assert exit_.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_folders_get_the_shortest_names_that_tell_them_apart() -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/a/other")]
    assert texts.distinct_names(paths) == ["a/run", "b/run", "a/other"]
    assert texts.distinct_names(paths[1:]) == ["run", "other"]
    assert texts.folder_names(paths) == {
        paths[0]: "x/a/run",
        paths[1]: "x/b/run",
        paths[2]: "x/a/other",
    }
    assert texts.folder_names(paths[:1]) == {paths[0]: "run"}


def test_absolute_paths_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path("/users/anna/project"))
    for text, expected in (
        ("path: /users/anna/project/runs/a", "path: runs/a"),
        ("path: /data/models/wan/vae", "path: …/wan/vae"),
        ('["--config=/users/anna/x.yaml"]', '["--config=…/x.yaml"]'),
        ("/users/anna", "…/anna"),
        ("url: http://127.0.0.1:80/score/me", "url: http://127.0.0.1:80/score/me"),
        ("runs/a and/or 1/2, 3 / 4", "runs/a and/or 1/2, 3 / 4"),
    ):
        assert texts.hide_folders(text) == expected
