"""Read run folders for a report.

A run folder is what the commands of launch write: config.yaml and environment.json, and
metrics.jsonl (training), samples/ (GRPO), or results.jsonl and summary.json (evaluations).
What is not there is None or empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import safe_yaml
from common.files import json_object, read_jsonl
from launch.evaluation.generator import flatten_scores
from launch.evaluation.intervals import mean_ci95

Row = dict[str, Any]

# Kinds of runs that a report has sections for.
KINDS = {
    "cold_start": "stage 1 of DeScore (launch/cold_start.py)",
    "grpo": "an alignment run (launch/grpo.py)",
    "dpo": "an alignment run on pairs (launch/dpo.py)",
    "rm": "an evaluation of a reward model (launch/evaluate.py rm)",
    "base": "an evaluation of the base generator (launch/evaluate.py generator)",
    "tuned": "an evaluation of the tuned generator, same prompts and seeds",
    "dpo_tuned": "an evaluation of the generator after Flow-DPO, same prompts and seeds",
}
# Kinds that write a summary.json when they have finished.
EVALUATIONS = ("rm", "base", "tuned", "dpo_tuned")
# What people said about a pair.
PAIR_LABELS = {
    1: "A preferred",
    -1: "B preferred",
    0: "tie",
}


@dataclass(frozen=True)
class Runs:
    """Folders of a report.

    shown  The run of each of `KINDS` that the sections are about.
    more   Kind and folder of further runs; their kind may also be dual_rl.
    """

    shown: dict[str, Path]
    more: Sequence[tuple[str, Path]] = ()

    def all(self) -> list[tuple[str, Path]]:
        """List kind and folder of every run."""
        return [*self.shown.items(), *self.more]


@dataclass(frozen=True)
class Comparison:
    """A measured quantity of the base generator, of the tuned generator, and their difference.

    Each is {"mean", "ci95", "n", "missing"} or None; ``watched`` means that it was not trained on.
    """

    name: str
    base: Row | None
    tuned: Row | None
    difference: Row | None
    watched: bool


def text_of(folder: Path | None, name: str) -> str | None:
    """Read a text file of a run; None where it has none."""
    if folder is None or not (folder / name).is_file():
        return None
    return (folder / name).read_text(
        encoding="utf-8",
        errors="replace",
    )


def config(folder: Path | None) -> Row:
    """Read config.yaml; {} without it."""
    text = text_of(folder, "config.yaml")
    # A run that was killed at its start may have an empty file.
    if not text:
        return {}
    try:
        loaded = safe_yaml.parse(text).value
    except safe_yaml.YamlError as error:
        raise ValueError(f"{folder}/config.yaml: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def metrics(folder: Path | None) -> list[dict[str, float]]:
    """Read metrics.jsonl, with NaN for null."""
    rows = []
    for row in _jsonl(folder, "metrics.jsonl"):
        # JSON has no NaN.
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def results(folder: Path | None) -> list[Row]:
    """Read results.jsonl."""
    return _jsonl(folder, "results.jsonl")


def summary(folder: Path | None) -> Row:
    """Read summary.json; {} where the evaluation has not finished."""
    text = text_of(folder, "summary.json")
    return json_object(text, f"{folder}/summary.json") if text else {}


def intervals(folder: Path | None) -> dict[str, Row]:
    """Means of an evaluation with their intervals; counts and thresholds have none."""
    return {
        name: value
        for name, value in summary(folder).items()
        if isinstance(value, dict) and "mean" in value
    }


def sampled_steps(folder: Path | None, place: str = "samples") -> dict[int, list[Row]]:
    """Read PLACE/step-N/samples.jsonl by step; each row gets its ``path``.

    The place is "samples" for the rollouts of a run with video_every, and "evaluation" for its
    held-out prompts.
    """
    if folder is None:
        return {}
    steps = {}
    for saved in sorted(folder.glob(f"{place}/step-*")):
        rows = _jsonl(saved, "samples.jsonl")
        if rows:
            step = int(saved.name.removeprefix("step-"))
            steps[step] = [{**row, "path": saved / row["file"]} for row in rows]
    return steps


def _jsonl(folder: Path | None, name: str) -> list[Row]:
    # A run that has just begun has no rows yet.
    if folder is None or not (folder / name).is_file():
        return []
    return read_jsonl(folder / name)


def scored_pairs(folder: Path | None) -> list[Row]:
    """Rows of a reward model's evaluation whose two videos have a reward."""
    rows = results(folder)
    return [
        row for row in rows if None not in (row.get("reward_A"), row.get("reward_B"))
    ]


def margin(row: Row) -> float:
    """Reward of video A minus that of video B."""
    return float(row["reward_A"] - row["reward_B"])


def weight_of(grpo: Path | None, reward: str) -> float | None:
    """Weight of a reward in a GRPO run; None where its config does not say."""
    # A config of an older version may lack the entry.
    entry = (config(grpo).get("rewards") or {}).get(reward)
    return float(entry.get("weight", 1.0)) if isinstance(entry, dict) else None


def by_video(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """Rows of an evaluation by prompt and seed."""
    return {(row["prompt"], row["seed"]): row for row in rows}


def value_of(row: Row, column: str) -> float:
    """A reward, or a part of it as "reward.part"; NaN where it is missing."""
    value = flatten_scores(row).get(column)
    return math.nan if value is None else float(value)


def compare(
    runs: Runs,
    columns: Iterable[str],
    *,
    tuned: str = "tuned",
) -> list[Comparison]:
    """Compare the base generator with the ``tuned`` kind of evaluation.

    The interval of the difference is a bootstrap over pairs of videos with equal seeds.
    """
    base_folder = runs.shown.get("base")
    tuned_folder = runs.shown.get(tuned)
    before = summary(base_folder)
    after = summary(tuned_folder)
    base_rows = by_video(results(base_folder))
    tuned_rows = by_video(results(tuned_folder))
    # Videos of the same prompt and seed.
    common = [video for video in base_rows if video in tuned_rows]

    comparisons = []
    for name in columns:
        # The interval of the difference needs both values of a pair.
        difference = None
        if common and name in before and name in after:
            difference = _difference(tuned_rows, base_rows, common, name)
        comparisons.append(
            Comparison(
                name,
                before.get(name),
                after.get(name),
                difference,
                weight_of(runs.shown.get("grpo"), name.partition(".")[0]) == 0.0,
            )
        )
    return comparisons


def difference(folder: Path, other: Path, name: str) -> Row | None:
    """Compare a quantity of two evaluations; None where they share no prompt and seed."""
    rows = by_video(results(folder))
    other_rows = by_video(results(other))
    common = [video for video in other_rows if video in rows]
    return _difference(rows, other_rows, common, name) if common else None


def _difference(
    after: Mapping[tuple[str, int], Row],
    before: Mapping[tuple[str, int], Row],
    common: Iterable[tuple[str, int]],
    name: str,
) -> Row:
    """MEAN change over the videos that both have, with a bootstrap interval over them."""
    changes = [
        value_of(after[video], name) - value_of(before[video], name) for video in common
    ]
    return mean_ci95(changes, seed=0).as_dict()


def columns(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Collect the finite values of each quantity, in order."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if math.isfinite(value):
                found.setdefault(name, []).append(value)
    return found


def mean_seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """MEAN seconds a step by phase, over all logged steps but the first, which warms up."""
    return {
        name.removeprefix("seconds/"): sum(values) / len(values)
        for name, values in columns(rows[1:] or rows).items()
        if name.startswith("seconds/")
    }
