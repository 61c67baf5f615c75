"""Evaluate generators with the oracle, and compare them over seeds and held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import tables
from experiments.runner import CommandStep, config_words
from rm.prompt import DIMENSIONS

# Name of the oracle in the config of the evaluation.
TOTAL = "shapes"
# arm -> seed -> column -> value of every prompt
Scores = dict[str, dict[int, dict[str, list[float]]]]


def run_folder(root: Path, seed: int, arm: str) -> Path:
    """Run folder of an arm; arm "base" is the generator before any training."""
    return root / f"seed{seed}" / arm


def training_step(script: str, words: list[str], folder: Path) -> CommandStep:
    """Command that trains a generator, done when its adapter exists."""
    done = folder / "final" / "pytorch_lora_weights.safetensors"
    return CommandStep(f"train {folder}", script, words, done)


def evaluation_step(
    folder: Path, seed: int, prompts: int, *, trained: bool
) -> CommandStep:
    """Command that evaluates the generator of a run folder on held-out prompts."""
    # Without an adapter the base generator is evaluated.
    words = config_words(
        "evaluate_oracle",
        f"seed={seed}",
        f"out={folder / 'eval'}",
        f"limit={prompts}",
    )
    if trained:
        words.append(f"adapter={folder / 'final'}")
    done = folder / "eval" / "summary.json"
    return CommandStep(
        f"judge {folder}",
        "launch/evaluate.py",
        ["generator", *words],
        done,
    )


def read_scores(
    root: Path,
    seeds: Sequence[int],
    arms: Iterable[str],
) -> Scores:
    """Read the oracle's total in [0, 1] and its sub-dimensions (0 to 2) of every video."""
    scores: Scores = {}
    for arm in arms:
        scores[arm] = {}
        for seed in seeds:
            rows = tables.read_results(run_folder(root, seed, arm) / "eval")

            # The total, then the sub-dimensions.
            columns = {TOTAL: [row["rewards"][TOTAL] for row in rows]}
            for name in DIMENSIONS:
                columns[name] = [row["parts"][TOTAL][name] for row in rows]
            scores[arm][seed] = columns
    return scores


def oracle_of(
    scores: Scores,
    arm: str,
    column: str = TOTAL,
    *,
    minus: str | None = None,
) -> dict[str, Any]:
    """MEAN of a column over seeds and prompts, or its difference to another arm."""

    def runs(name: str) -> dict[int, tables.Tables]:
        return {seed: [columns[column]] for seed, columns in scores[name].items()}

    return tables.over_seeds(runs(arm), None if minus is None else runs(minus))


def record_of(scores: Scores, arm: str) -> dict[str, Any]:
    """Collect an arm's total, over all seeds and of each."""
    by_seed = scores[arm].items()
    return {
        "oracle": oracle_of(scores, arm),
        "seeds": {seed: round(fmean(columns[TOTAL]), 4) for seed, columns in by_seed},
    }
