"""launch/calibrate.py --fast: thresholds from two evaluations of the same held-out pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from launch import calibrate
from launch.evaluation.preference import score_batch, summarise_pairs
from launch.evaluation.thinking import Guarantee, HeldoutPairs, group_threshold
from rm.cascade import AffineFit, Thinking, clopper_pearson_upper
from tests.rm.test_adaptive import RULE, with_rule


def write_evaluation(
    folder: Path, rows: list[tuple[float, float, int]], options: str
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"checkpoint: {folder.parent / 'descore'}\noptions: {options}\n"
    )
    lines = []
    for index, (reward_a, reward_b, label) in enumerate(rows):
        row = {
            "index": index,
            "prompt": f"p{index}",
            "reward_A": reward_a,
            "reward_B": reward_b,
            "label": label,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "results.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def evaluations(tmp_path: Path) -> Path:
    """200 pairs: thinking is always right; of the 50 least confident, every tenth harms.

    The fast margins are 200, 199, ..., 1, half of the slow ones in size. Ten more pairs are ties.
    """
    descore = tmp_path / "descore"
    descore.mkdir()
    (descore / "descore.json").write_text(
        json.dumps(
            {
                "format": 1,
                "cot_in_training": "masked",
                "dimensions": {"overall": {"weight": 1.0, "loss_weight": 1.0}},
            }
        )
    )
    fast = []
    slow = []
    for i in range(200):
        margin = 200.0 - i
        label = 1 if i % 2 else -1
        harmful = margin <= 50 and margin % 10 == 0
        fast.append((margin * (-label if harmful else label), 0.0, label))
        slow.append((2 * margin * label, 0.0, label))
    fast += [(50.5, 0.0, 0)] * 10
    slow += [(-101.0, 0.0, 0)] * 10
    write_evaluation(tmp_path / "fast", fast, "{cots: 0}")
    write_evaluation(tmp_path / "slow", slow, "{}")
    return tmp_path


def calibrated(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> Thinking:
    paths = [folder / "descore", folder / "slow"]
    argv = ["calibrate.py", *map(str, paths), "--fast", str(folder / "fast"), *words]
    monkeypatch.setattr(sys, "argv", argv)
    calibrate.main()
    return Thinking.load(folder / "descore")


def test_threshold_stands_where_the_harm_would_pass_its_bound(
    evaluations: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 200 pairs at 5 %: 4 losses have the bound 0.0453, 5 have 0.0518. The fifth is at 10."""
    found = calibrated(monkeypatch, evaluations, "--alpha", "0.05")
    assert clopper_pearson_upper(4, 200, delta=0.05) < 0.05
    assert clopper_pearson_upper(5, 200, delta=0.05) > 0.05
    assert found.pairs.losses == 4
    assert found.pairs.n == 200
    # fast margins are put on the slow scale
    assert found.pairs.confidence == pytest.approx(11 * found.slope, rel=1e-5)
    assert found.pairs.thought == pytest.approx(10 / 200)
    assert found.cots == 1
    assert found.groups is None
    assert "thinking=adaptive" in capsys.readouterr().out
    assert not (evaluations / "descore" / "calibration.json").exists()


def test_disagreement_counts_ties_of_people_too(
    evaluations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 50.5 ten pairs have the opposite order at once: with 210 pairs that is too much."""
    found = calibrated(
        monkeypatch, evaluations, "--alpha", "0.05", "--risk", "disagreement"
    )
    assert found.pairs.n == 210
    assert found.pairs.losses == 0
    assert found.pairs.confidence == pytest.approx(51 * found.slope, rel=1e-5)


def test_evaluations_in_the_wrong_order_are_refused(
    evaluations: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (evaluations / "fast").rename(evaluations / "x")
    (evaluations / "slow").rename(evaluations / "fast")
    (evaluations / "x").rename(evaluations / "slow")
    with pytest.raises(SystemExit, match="2"):
        calibrated(monkeypatch, evaluations)
    assert "cots=0" in capsys.readouterr().err


def test_evaluations_of_other_pairs_are_refused(evaluations: Path) -> None:
    lines = (evaluations / "slow" / "results.jsonl").read_text().splitlines()
    (evaluations / "slow" / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="210 pairs"):
        HeldoutPairs.read(evaluations / "fast", evaluations / "slow")


def test_group_threshold_is_about_the_share_of_discordant_pairs() -> None:
    """Ten sure groups agree, ten unsure have one of three pairs reversed."""
    fast = {}
    slow = {}
    for i in range(20):
        gap = 10.0 if i < 10 else 0.5
        fast[f"p{i}"] = {"a": 0.0, "b": gap, "c": 2 * gap}
        order = (0.0, 1.0, 2.0) if i < 10 else (1.0, 0.0, 2.0)
        slow[f"p{i}"] = dict(zip("abc", order, strict=True))
    fit = AffineFit(0.0, 1.0, 1.0)
    promise = Guarantee("crc", "disagreement", 0.1, 0.05)
    found = group_threshold(fast, slow, fit, promise, ["x"])
    # (losses + 1) / 21 <= 0.1 allows 1.1: ten groups of a third have 3.33
    assert found.losses == 0
    assert found.thought == 0.5
    assert found.confidence == pytest.approx(1.0, abs=1e-6)
    # one pair of a group is reversed with probability 1/3, drawn by its prompt
    promise = Guarantee("clopper_pearson", "disagreement", 0.6, 0.05)
    found = group_threshold(fast, slow, fit, promise, ["x"])
    assert found.thought == 0
    assert found.losses == int(found.losses)
    assert 0 < found.losses < 10
    with pytest.raises(ValueError, match="other videos"):
        group_threshold(fast, {**slow, "p0": {"a": 1.0}}, fit, promise, [])


def test_evaluation_decides_pair_by_pair_and_counts_the_thinking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two pairs with the same prompt: the first is fast, the second is not."""
    from types import SimpleNamespace

    pairs = [
        SimpleNamespace(video_A="0_5", video_B="9_6", prompt="p"),
        SimpleNamespace(video_A="0_7", video_B="0.5_8", prompt="p"),
    ]
    rows = score_batch(with_rule(RULE), pairs)
    assert [(row["reward_A"], row["reward_B"]) for row in rows] == [(1, 19), (7, 8)]
    for row in rows:
        row["label"] = -1
    summary = summarise_pairs(rows, seed=0, resamples=10)
    assert summary["thought"]["mean"] == 0.5
    assert summary["without_ties"]["mean"] == 1
    assert torch.tensor([row["parts_A"]["confidence"] for row in rows]).tolist() == [
        18,
        1,
    ]
