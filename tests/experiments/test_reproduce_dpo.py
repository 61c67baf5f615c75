"""The comparison of learning from pairs at its smallest, by the real commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from common.files import read_jsonl
from experiments.oracle_scores import oracle_of
from experiments.reproduce_dpo import (
    TITLES,
    Size,
    epochs_of,
    forwards_of_pairs,
    updates_of_grpo,
)
from tests.launch.processes import run


def test_costs_by_hand() -> None:
    size = Size(train_pairs=2000, prompts=100, epochs=0.5, heldout=240)
    assert (
        forwards_of_pairs(size) == 100 * 8 * 8
    )  # eight videos of eight steps, no guidance
    learned = (
        100 * epochs_of(size) * 8
    )  # two videos, a forward, a backward of two and a reference
    # an update of the demo's recipe: 32 groups of (k + 1) + 8 (7 - k), k = 0..3, and 3 + 1
    assert updates_of_grpo(size) == round((6400 + learned) / (32 * 50.5))


def test_gains_are_taken_seed_by_seed() -> None:
    scores = {"base": {0: {"shapes": [0.1, 0.3]}, 1: {"shapes": [0.5, 0.9]}}}
    scores["dpo"] = {
        seed: {"shapes": [v + 0.125 for v in one["shapes"]]}
        for seed, one in scores["base"].items()
    }
    gain = oracle_of(scores, "dpo", "shapes", minus="base")
    assert [gain["mean"], *gain["ci95"]] == pytest.approx([0.125, 0.125, 0.125])
    assert oracle_of(scores, "base")["mean"] == pytest.approx(0.45)


@pytest.mark.long
def test_the_smallest_comparison(tmp_path: Path) -> None:
    words = [
        "--seeds",
        "0",
        "--train-pairs",
        "32",
        "--prompts",
        "6",
        "--epochs",
        "0.25",
        "--heldout",
        "4",
    ]
    again = [
        sys.executable,
        "experiments/reproduce_dpo.py",
        "--run-dir",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path),
    ]
    run(*again, *words, timeout=900)
    record = json.loads((tmp_path / "reproduce_dpo.json").read_text(encoding="utf-8"))
    assert list(record["arms"]) == list(TITLES)
    for arm, found in record["arms"].items():
        rows = read_jsonl(tmp_path / "run" / "seed0" / arm / "eval" / "results.jsonl")
        values = [row["rewards"]["shapes"] for row in rows]
        assert len(values) == 4
        assert found["oracle"]["mean"] == pytest.approx(sum(values) / 4)
    assert record["arms"]["base"]["gain"]["mean"] == 0.0
    counts = record["pairs"][0]
    assert counts["prompts"] == 6
    assert counts["pairs"] + counts["close"] + counts["unjudged"] == 6
    # one step of 32 pairs: winners alone with gradient; or both, and both again for the reference
    filmed = 6 * 8 * 8
    assert record["arms"]["sft"]["forwards"] == filmed + 32 * 3
    assert record["arms"]["rwr"]["forwards"] == filmed + 64 * 3
    assert record["arms"]["dpo"]["forwards"] == filmed + 64 * 4
    page = (tmp_path / "reproduce_dpo.md").read_text(encoding="utf-8")
    assert all(title in page for title in TITLES.values())
