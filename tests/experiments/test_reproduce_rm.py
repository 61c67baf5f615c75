"""The paper's comparison at its smallest: reward models trained and tested by the real commands."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from common.files import read_jsonl
from experiments.reproduce_rm import sequences_of, steps_of
from experiments.rm_methods import METHODS, TESTS, Cell
from experiments.rm_results import (
    RmOutcome,
    mean_of,
    read_outcomes,
    stated_order,
    stated_table,
)
from rm.prompt import DIMENSIONS
from tests.launch.processes import run

WORDS = ("--seeds", "0", "--sizes", "48", "--tests", "12", "--rl-steps", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    again = [
        sys.executable,
        "experiments/reproduce_rm.py",
        "--run-dir",
        str(folder / "run"),
        "--out",
        str(folder / "out"),
    ]
    run(*again, *WORDS, timeout=900)
    before = {
        path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.json*")
    }
    run(*again, *WORDS)  # started again there is nothing left to do
    timings = folder / "run" / "seconds.json"
    assert all(
        path.stat().st_mtime_ns == at for path, at in before.items() if path != timings
    )
    return folder


@pytest.mark.long
def test_the_smallest_comparison(made: Path) -> None:
    record = json.loads(
        (made / "out" / "reproduce_rm.json").read_text(encoding="utf-8")
    )
    assert sorted(judge["method"] for judge in record["judges"]) == sorted(METHODS)
    for judge in record["judges"]:
        assert list(judge["tests"]) == list(TESTS)
        thinks = judge["method"] not in ("discriminative", "stage1_at_once")
        assert all(
            ("sub_dimensions" in found) == thinks for found in judge["tests"].values()
        )
        assert all(
            1 <= found["accuracy"]["n"] <= 12 for found in judge["tests"].values()
        )
    # the accuracy equals that of evaluate.py over all tests
    folder = Cell(0, 48, "stage1").folder(made / "run")
    summary = json.loads(
        (folder / "tests" / "summary.json").read_text(encoding="utf-8")
    )["without_ties"]
    own = next(
        judge["tests"] for judge in record["judges"] if judge["method"] == "stage1"
    )
    right = sum(
        found["accuracy"]["mean"] * found["accuracy"]["n"] for found in own.values()
    )
    assert right / summary["n"] == pytest.approx(summary["mean"])
    page = (made / "out" / "reproduce_rm.md").read_text(encoding="utf-8")
    assert all(method.title in page for method in METHODS.values())
    for name in ("size", "training"):
        assert "<svg" in (made / "out" / f"reproduce_rm_{name}.svg").read_text(
            encoding="utf-8"
        )


@pytest.mark.long
def test_reward_models_of_all_methods_differ(made: Path) -> None:
    cells = [cell for sequence in sequences_of(0, [48]) for cell in sequence]
    rewards = {}
    for cell in cells:
        rows = read_jsonl(cell.folder(made / "run") / "tests" / "results.jsonl")
        rewards[cell.method] = [row["reward_A"] for row in rows]
    assert len({tuple(values) for values in rewards.values()}) == len(METHODS)
    outcomes = read_outcomes(made / "run", cells)
    base = outcomes[Cell(0, 0, "base")]["indomain"]
    assert (
        sum(base.right) / len(base.right) > 0.5
    )  # the base states scores that mean something
    # The base is right in 0.74 of the scores of renders (qwen.measured.json); 120 scores have a
    # standard deviation of 0.04, and shuffled annotations give 0.52.
    assert sum(base.thought) / len(base.thought) > 0.74 - 3 * 0.04


def test_steps_start_from_the_earlier_checkpoint() -> None:
    run_dir = Path("r")
    train, evaluate = steps_of(Cell(1, 500, "descore"), run_dir, rl_steps=7)
    assert f"checkpoint={run_dir / 'seed1' / '500_stage1' / 'final'}" in train.arguments
    assert {"dual_rl.steps=7", "data.limit=500", "seed=1"} <= set(train.arguments)
    assert (
        f"checkpoint={run_dir / 'seed1' / '500_descore' / 'final'}"
        in evaluate.arguments
    )
    (at_once,) = steps_of(Cell(1, 500, "stage1_at_once"), run_dir, rl_steps=7)
    assert {
        f"checkpoint={run_dir / 'seed1' / '500_stage1' / 'final'}",
        "options={cots: 0}",
    } <= set(at_once.arguments)
    # what is trained comes before what starts from it
    order = [cell.method for sequence in sequences_of(0, [500]) for cell in sequence]
    assert order.index("stage1") < order.index("stage1_at_once")
    assert order.index("stage1") < order.index("descore")
    assert order.index("stage1_p0") < order.index("descore_p0")
    assert sorted(order) == sorted(METHODS)


def test_stated_order_by_hand() -> None:
    def row(a: float | None, b: float | None, label: int) -> dict:
        parts = [
            None if x is None else {**dict.fromkeys(DIMENSIONS, 1.0), "subject": x}
            for x in (a, b)
        ]
        return {"parts_A": parts[0], "parts_B": parts[1], "label": label}

    assert [stated_order(row(2.0, 0.0, label)) for label in (1, -1)] == [1.0, -1.0]
    assert stated_order(row(1.0, 1.0, -1)) == 0.0
    assert math.isnan(stated_order(row(None, 1.0, 1)))
    sure, unsure = (
        RmOutcome((1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, -1.0)),
        RmOutcome((0.0,), (1.0,)),
    )
    outcomes = {
        Cell(seed, 10, "descore"): {n: sure if n == "wan" else unsure for n in TESTS}
        for seed in (0, 1)
    }
    line = next(
        x for x in stated_table(outcomes, 10) if "both stages, p = 0.5 | out" in x
    )
    # A seed has four pairs of wan and a pair of each of three others.
    assert line.endswith("| 0.571: 0.250 | 0.286: 0.500 | 0.143: 0.000 |")


def test_over_seeds_and_differences_by_hand() -> None:
    def outcome(*right: float) -> dict[str, RmOutcome]:
        return {name: RmOutcome(right) for name in TESTS}

    outcomes = {
        Cell(0, 10, "descore"): outcome(1.0, 1.0, 0.0, 1.0),
        Cell(0, 10, "stage1"): outcome(1.0, 0.0, 0.0, 1.0),
        Cell(1, 10, "descore"): outcome(1.0, 0.0, 0.0, 0.0),
        Cell(1, 10, "stage1"): outcome(1.0, 0.0, 0.0, 0.0),
    }
    found = mean_of(outcomes, 10, "descore", TESTS[:1], "right")
    assert found["mean"] == pytest.approx(0.5)
    assert mean_of(outcomes, 10, "descore", TESTS[:1], "thought") is None
    found = mean_of(outcomes, 10, "descore", TESTS, "right", minus="stage1")
    assert found["mean"] == pytest.approx((0.25 + 0.0) / 2)
    # two seeds share the same items, so the interval knows the spread of both
    assert found["ci95"][0] < 0.125 < found["ci95"][1]
