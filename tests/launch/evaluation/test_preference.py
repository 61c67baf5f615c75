"""launch/evaluate.py rm and launch/calibrate.py: accuracy on human preferences, bad files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy import stats

from common.config import load
from common.files import read_jsonl
from common.types import Score
from common.video_io import write_mp4
from launch import calibrate, evaluate
from launch.evaluation import preference as pair_rows
from launch.schemas.evaluation import ScoreRun
from rm.data import Pair
from tests.fakes import decoder_with_a_trap
from tests.launch.processes import next_step


class NamedScorer:
    """Score v_X.mp4 with X; raise for broken.mp4, return NaN for nan.mp4."""

    name = "descore"

    def score(
        self,
        videos: Sequence[Path],
        prompts: Sequence[str],
        *,
        fps: float | None = None,
    ) -> Score:
        if any("broken" in video.name for video in videos):
            raise ValueError("broken.mp4: cannot be decoded")
        values = [float(video.stem.partition("_")[2] or "nan") for video in videos]
        return Score(
            torch.tensor(values),
            parts={"subject": torch.ones(len(values))},
            texts=[v.name for v in videos],
        )


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Margins 1, -1, 2, NaN (not scored), NaN (broken), 0.25; labels A, A, A, B, A, same."""
    import rm.scorer

    scorer = NamedScorer()
    monkeypatch.setattr(
        rm.scorer.DeScoreScorer, "load", classmethod(lambda cls, path: scorer)
    )
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "descore.json").write_text('{"format": 1}')
    table = [
        ("v_2", "v_1", "A"),
        ("v_1", "v_2", "A"),
        ("v_3", "v_1", "A"),
        ("nan", "v_9", "B"),
    ]
    table += [("broken", "v_1", "A"), ("v_1", "v_0.75", "same")]
    lines = ["videos,prompt,GSB"]
    for a, b, label in table:
        for name in (a, b):
            write_mp4(
                tmp_path / f"{name}.mp4",
                torch.zeros(2, 16, 16, 3, dtype=torch.uint8),
                8.0,
            )
        lines.append(f"\"['{a}.mp4', '{b}.mp4']\",a prompt,{label}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def test_preference_accuracy_of_hand_made_margins(pairs: Path, tmp_path: Path) -> None:
    words = [
        f"out={tmp_path / 'eval'}",
        f"checkpoint={tmp_path / 'judge'}",
        f"pairs={pairs}",
        "batch=6",
    ]
    evaluate.main(["--local_rank=0", "rm", *words])
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["without_ties"]["mean"] == pytest.approx(
        2 / 5
    )  # the unjudged pairs are wrong
    assert summary["without_ties"]["n"] == 5
    # threshold 0.25 keeps the two right ones and wins the tie
    assert summary["with_ties"]["mean"] == pytest.approx(3 / 6)
    assert summary["threshold"] == pytest.approx(0.25)
    assert (summary["pairs"], summary["ties"], summary["unjudged"]) == (6, 1, 2)
    rows = read_jsonl(tmp_path / "eval" / "results.jsonl")
    assert (rows[0]["reward_A"], rows[0]["cot_B"], rows[0]["parts_A"]) == (
        2.0,
        "v_1.mp4",
        {"subject": 1.0},
    )
    assert rows[3]["reward_A"] is None
    assert "broken.mp4" in rows[4]["error"]
    assert (tmp_path / "eval" / rows[2]["video_A"]).resolve() == tmp_path / "v_3.mp4"


def test_file_that_kills_the_decoder_loses_its_pair(
    pairs: Path, tmp_path: Path, monkeypatch
) -> None:
    decoder_with_a_trap(
        tmp_path, "'v_3' in line and os.kill(os.getpid(), 11)", monkeypatch
    )
    evaluate.main(
        [
            "rm",
            f"out={tmp_path / 'eval'}",
            f"checkpoint={tmp_path / 'judge'}",
            f"pairs={pairs}",
            "batch=6",
        ]
    )
    rows = read_jsonl(tmp_path / "eval" / "results.jsonl")
    assert ["error" in row for row in rows] == [False, False, True, False, True, False]
    assert "v_3.mp4" in rows[2]["error"]
    assert "-11" in rows[2]["error"]


def test_dimension_and_sub_dimension_accuracies_by_hand() -> None:
    answer = '<answer>{"dimensional_scores": {"subject": 2, "camera": 1}}</answer>'
    pair = Pair(
        "p",
        Path("a"),
        Path("b"),
        "",
        "",
        1,
        {"subject": 2, "camera": 0},
        {"subject": 1},
        {"TA": -1},
    )
    found = {
        "cot_A": answer,
        "cot_B": answer,
        "parts_A": {"reward.TA": 1.0, "reward.camera": 2.0, "subject": 2.0},
    }
    assert pair_rows.quality(pair, found) == {"quality_A": 0.5, "quality_B": 0.0}
    assert pair_rows.labels(pair, found) == {
        "labels": {"TA": -1}
    }  # B's camera is unknown
    rows = [
        {
            "label": 1,
            "reward_A": 1.0,
            "reward_B": 0.0,
            "parts_A": {"reward.TA": a},
            "parts_B": {"reward.TA": b},
            "labels": {"TA": label},
            "quality_A": quality,
            "quality_B": 1.0,
        }
        for a, b, label, quality in (
            (0.0, 1.0, -1, 1.0),
            (3.0, 1.0, 1, 0.0),
            (1.0, 2.0, 1, 0.5),
            (9.0, 0.0, 0, 0.5),
        )
    ]
    rows += [{"label": 1, "error": "broken"}]
    summary = pair_rows.summarise_pairs(rows, seed=0, resamples=50)
    assert summary["without_ties"]["mean"] == pytest.approx(4 / 5)
    assert (summary["without_ties.TA"]["mean"], summary["without_ties.TA"]["n"]) == (
        pytest.approx(2 / 3),
        3,
    )
    assert (summary["sub_dimensions"]["mean"], summary["sub_dimensions"]["n"]) == (
        pytest.approx(0.75),
        4,
    )


def calibrated(monkeypatch: pytest.MonkeyPatch, *words: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, words)])
    calibrate.main()


def test_calibrate_uses_the_rewards_of_an_evaluation(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge = tmp_path / "judge"
    words = [f"checkpoint={judge}", f"pairs={pairs}", "batch=6"]
    evaluate.main(["rm", f"out={tmp_path / 'eval'}", *words])
    step = next_step(capsys.readouterr().out)
    assert step == f"python launch/calibrate.py {judge} {tmp_path / 'eval'}".split()
    calibrated(monkeypatch, *map(Path, step[2:]))

    # Its next step are overrides of a run that scores.
    overrides = next_step(capsys.readouterr().out)[:2]
    scoring = load(ScoreRun, "configs/wan/score.yaml", overrides)
    assert scoring.rewards["descore"].checkpoint == str(judge)
    assert scoring.rewards["descore"].options["calibrated"] is True
    found = json.loads((judge / "calibration.json").read_text())
    values = [
        2.0,
        1.0,
        1.0,
        2.0,
        3.0,
        1.0,
        9.0,
        1.0,
        0.75,
    ]  # of the pair with a broken file nothing is known
    assert found["videos"] == len(values)
    assert found["mean"]["overall"] == pytest.approx(sum(values) / len(values))
    assert found["std"]["overall"] == pytest.approx(
        torch.tensor(values).std(correction=0).item()
    )

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "descore.json").write_text('{"format": 1}')
    with pytest.raises(SystemExit, match="2"):
        calibrated(monkeypatch, tmp_path / "other", tmp_path / "eval")
    assert str(judge) in capsys.readouterr().err


def test_accuracy_without_ties_has_the_binomial_interval() -> None:
    """With 255 right of 300 pairs, a resample's right pairs are Binomial(300, 0.85)."""
    rows = [
        {"reward_A": 1.0 if i < 255 else -1.0, "reward_B": 0.0, "label": 1}
        for i in range(300)
    ]
    rows += [{"reward_A": 0.0, "reward_B": 3.0, "label": 0} for _ in range(100)]
    summary = pair_rows.summarise_pairs(rows, seed=0, resamples=2_000)
    low, high = stats.binom.ppf([0.025, 0.975], 300, 0.85) / 300
    assert summary["without_ties"]["mean"] == pytest.approx(0.85)
    assert summary["without_ties"]["ci95"] == pytest.approx([low, high], abs=1 / 300)
    assert summary["with_ties"]["mean"] == pytest.approx(255 / 400)


@pytest.mark.slow
def test_real_descore_scores_the_files_of_the_table(tmp_path: Path) -> None:
    """A batch gives each file its score alone; a pair with a broken file counts as wrong."""
    from rm.model import DeScore
    from rm.scorer import DeScoreScorer
    from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, save_tiny_qwen

    base = save_tiny_qwen(tmp_path / "base")
    TEMPLATE.save(base / "prompt.json")
    SETTINGS.save(base / "video.json")
    DeScore.from_base(base).save(tmp_path / "judge")
    for i in range(5):
        write_mp4(tmp_path / f"{i}.mp4", random_frames(i), 4.0)
    (tmp_path / "5.mp4").write_bytes(b"no video")
    table = [(0, 1, "A"), (2, 3, "B"), (4, 5, "A")]
    lines = [f"\"['{a}.mp4', '{b}.mp4']\",prompt {a},{label}" for a, b, label in table]
    (tmp_path / "pairs.csv").write_text("\n".join(["videos,prompt,GSB", *lines]) + "\n")
    words = [
        f"out={tmp_path / 'eval'}",
        f"checkpoint={tmp_path / 'judge'}",
        f"pairs={tmp_path / 'pairs.csv'}",
    ]
    evaluate.main(["rm", *words, "options={cots: 0}"])

    rows = read_jsonl(tmp_path / "eval" / "results.jsonl")
    scorer = DeScoreScorer.load(tmp_path / "judge", cots=0)
    for row, (a, b, _) in zip(rows[:2], table, strict=False):
        alone = [
            float(scorer.score([tmp_path / f"{v}.mp4"], [f"prompt {a}"]).value_B[0])
            for v in (a, b)
        ]
        assert [row["reward_A"], row["reward_B"]] == pytest.approx(alone, abs=1e-5)
        assert alone[0] != pytest.approx(alone[1], abs=1e-4)
    right = sum(
        (row["reward_A"] - row["reward_B"]) * row["label"] > 0 for row in rows[:2]
    )
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["without_ties"]["mean"] == pytest.approx(right / 3)
    assert summary["unjudged"] == 1
