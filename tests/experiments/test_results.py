"""Results can be made again from committed values; a demo's reward model against its base."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from common.files import write_json
from experiments import tables
from experiments.heldout import order_right, read_decided, stated_score, summarise
from experiments.intervals import differing
from experiments.long_grpo import PARTS, UTILITY, change, page_of, peak_of
from experiments.oracle_scores import oracle_of
from tests.documented import ROOT
from toy.lessons import answer_text
from toy.people import PEOPLE
from toy.world import SUB_DIMENSIONS


def test_committed_intervals_come_out_the_same() -> None:
    _, found = differing(ROOT / "docs" / "results")
    assert not found


def test_changed_value_is_found(tmp_path: Path) -> None:
    scores = {
        "base": {0: {"shapes": [0.1, 0.4]}, 1: {"shapes": [0.2, 0.6]}},
        "dpo": {0: {"shapes": [0.3, 0.4]}, 1: {"shapes": [0.2, 0.9]}},
    }
    arms = {
        "base": {"oracle": oracle_of(scores, "base")},
        "dpo": {
            "oracle": oracle_of(scores, "dpo"),
            "gain": oracle_of(scores, "dpo", minus="base"),
        },
    }
    write_json(tmp_path / "reproduce_dpo.json", {"arms": arms})
    path = tmp_path / "reproduce_dpo.values.json.gz"
    tables.write_values(path, scores)
    assert differing(tmp_path) == (3, [])
    scores["dpo"][1]["shapes"][0] = 0.3
    tables.write_values(path, scores)
    count, found = differing(tmp_path)
    assert (count, len(found)) == (3, 2)
    assert all("dpo" in line for line in found)


def test_values_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tables.write_values(tmp_path / name, {"x": [0.25, 1.0]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert tables.read_values(tmp_path / "a") == {"x": [0.25, 1.0]}


@pytest.mark.parametrize(
    ("a", "b", "label", "right"),
    [
        (2.0, 1.0, 1, 1.0),
        (2.0, 1.0, -1, 0.0),
        (1.0, 2.0, -1, 1.0),
        (1.0, 1.0, 1, 0.5),
        (None, 1.0, -1, 0.0),
    ],
)
def test_order_right(a: float | None, b: float, label: int, right: float) -> None:
    assert order_right(a, b, label) == right


def test_reward_model_is_compared_with_its_base_pair_by_pair(tmp_path: Path) -> None:
    """Three pairs, the middle one a tie; results stand in another order than the table."""
    texts = [answer_text(dict.fromkeys(SUB_DIMENSIONS, value)) for value in (2, 1, 0)]
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "heldout.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "CoT_A", "CoT_B", "utility_A", "utility_B"])
        writer.writerow([["a0.mp4", "b0.mp4"], texts[0], texts[1], 0.9, 0.8])
        writer.writerow([["a1.mp4", "b1.mp4"], texts[0], texts[1], 0.5, 0.5])
        writer.writerow([["a2.mp4", "b2.mp4"], texts[2], texts[2], 0.2, 0.6])
    (tmp_path / "eval_rm").mkdir()
    rows = [
        {"index": 1, "video_A": "x/a2.mp4", "reward_A": 0.1, "reward_B": 0.3},
        {"index": 0, "video_A": "x/a0.mp4", "reward_A": 0.1, "reward_B": 0.3},
        {"index": 2, "video_A": "x/a1.mp4", "reward_A": 0.1, "reward_B": 0.3},
    ]
    labels = (-1, 1, 0)
    lines = [
        json.dumps({**row, "label": label})
        for row, label in zip(rows, labels, strict=True)
    ]
    (tmp_path / "eval_rm" / "results.jsonl").write_text("\n".join(lines) + "\n")

    table = tmp_path / "data" / "heldout.csv"
    pairs = read_decided(table, tmp_path / "eval_rm")
    assert pairs.reward_model == (0.0, 1.0)
    assert pairs.base == (1.0, 0.5)
    assert pairs.best == (PEOPLE.best_accuracy(0.9 - 0.8), PEOPLE.best_accuracy(-0.4))
    assert pairs.gain == [-1.0, 0.5]
    summary = summarise(tmp_path)
    assert summary["gain_over_base"]["mean"] == -0.25
    assert stated_score(texts[0]) == 5.0
    assert stated_score("nothing") is None


def test_rise_and_fall_of_the_utility_by_hand(tmp_path: Path) -> None:
    def rows(*utilities: float) -> list[dict[str, float]]:
        found = []
        for step, value in enumerate(utilities):
            row = {f"{UTILITY}.{part}": value for part in PARTS}
            row |= {"step": step, UTILITY: value}
            found.append(row | {"eval/descore": float(step), "eval/shapes": value})
        return found

    curves = {0: rows(0.1, 0.5, 0.4), 1: rows(0.2, 0.8, 0.5)}
    assert peak_of(curves) == 1
    assert change(curves, UTILITY, 0, 1)["mean"] == pytest.approx(0.5)
    keys = [key for key in curves[0][0] if key != "step"]
    record = {
        "commit": "x",
        "peak": 1,
        "rise": {key: change(curves, key, 0, 1) for key in keys},
        "fall": {key: change(curves, key, 1, -1) for key in keys},
    }
    (line,) = [row for row in page_of(curves, record) if row.startswith("| people |")]
    assert line.startswith("| people | 0.150 | 0.650 | 0.450 | 0.500")

    # The committed values give the same changes, and a changed value does not.
    write_json(tmp_path / "long_grpo.json", record)
    values = tmp_path / "long_grpo.values.json.gz"
    tables.write_values(values, curves)
    assert differing(tmp_path) == (2 * len(keys), [])
    curves[0][-1][UTILITY] = 0.3
    tables.write_values(values, curves)
    (line,) = differing(tmp_path)[1]
    assert line.startswith(f"long_grpo: {UTILITY}: fall")
