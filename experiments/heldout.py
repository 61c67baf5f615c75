"""The reward model of a demo against the base model and the best possible, on the same pairs.

The base Qwen3-VL has written the chains of thought of the demo's table, so its stated score is
read from there. Everything is about held-out pairs on which people decided.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import tables
from launch.evaluation.intervals import mean_ci95
from rm.prompt import parse_answer
from toy.people import PEOPLE


@dataclass(frozen=True)
class DecidedPairs:
    """Values of each pair that is no tie, in the order of the table.

    reward_model  1 if DeScore's order is the label, else 0.
    base          The same for the score that the base states; equal scores are one half.
    best          Probability that the order of the true utilities is the label.
    """

    reward_model: tuple[float, ...]
    base: tuple[float, ...]
    best: tuple[float, ...]

    @property
    def gain(self) -> list[float]:
        """DeScore minus base, pair by pair."""
        return [a - b for a, b in zip(self.reward_model, self.base, strict=True)]


def read_decided(table: Path, results: Path) -> DecidedPairs:
    """Join a table of pairs with the folder of launch/evaluate.py rm about it."""
    rows = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first, _ = ast.literal_eval(row["videos"])
            rows[Path(first).name] = row
    right = []
    base = []
    best = []
    for result in tables.read_results(results):
        if result["label"] == 0:
            continue
        row = rows[Path(result["video_A"]).name]
        rewards = (result["reward_A"], result["reward_B"])
        right.append(order_right(*rewards, result["label"]))
        stated = [stated_score(row[f"CoT_{letter}"]) for letter in "AB"]
        base.append(order_right(*stated, result["label"]))
        difference = float(row["utility_A"]) - float(row["utility_B"])
        best.append(PEOPLE.best_accuracy(difference))
    return DecidedPairs(tuple(right), tuple(base), tuple(best))


def order_right(a: float | None, b: float | None, label: int) -> float:
    """1 if the order of two scores is the label (1 or -1), 1/2 if they are equal, else 0.

    A pair with a missing score is wrong.
    """
    if a is None or b is None:
        return 0.0
    if a == b:
        return 0.5
    return float((a > b) == (label > 0))


def stated_score(cot: str) -> float | None:
    """The overall score that a chain of thought states."""
    answer = parse_answer(cot)
    return None if answer is None else answer.overall


def summarise(run: Path) -> dict[str, Any]:
    """Accuracies of a demo with their intervals, and the gain over the base."""
    pairs = read_decided(run / "data" / "heldout.csv", run / "eval_rm")

    def interval(values: Sequence[float]) -> dict[str, Any]:
        return mean_ci95(values, seed=0).as_dict()

    return {
        "heldout_accuracy": interval(pairs.reward_model),
        "base_stated_score": interval(pairs.base),
        "gain_over_base": interval(pairs.gain),
        "best_possible": interval(pairs.best),
    }
