"""What run folders hold, read for a report. Nothing is invented: what is not there is None or an empty list.

A run folder is what `launch/` programs write: config.yaml and environment.json, and metrics.jsonl (training), samples/
(GRPO), or results.jsonl and summary.json (evaluations).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import safe_yaml
from launch.evaluation.intervals import mean_ci95

Row = dict[str, Any]

KINDS = ("cold_start", "grpo", "dpo", "rm", "base", "tuned", "dpo_tuned")


class BrokenFileError(ValueError):
    """A file of a run that is not what its program writes; the message names it, and the line."""


@dataclass(frozen=True)
class Found:
    """A run folder, and which of `KINDS` it is, or dual_rl."""

    kind: str
    folder: Path


@dataclass(frozen=True)
class Runs:
    """Folders a report is about, by what is in them; None for what there is not. ``more`` are further ones."""

    cold_start: Path | None = None
    grpo: Path | None = None
    dpo: Path | None = None
    rm: Path | None = None
    base: Path | None = None
    tuned: Path | None = None
    dpo_tuned: Path | None = None
    more: tuple[Found, ...] = ()

    def named(self) -> dict[str, Path]:
        """The folders that are there, by field."""
        return {
            kind: getattr(self, kind)
            for kind in KINDS
            if getattr(self, kind) is not None
        }


@dataclass(frozen=True)
class Comparison:
    """One measured quantity, of the base generator, the tuned one, and their difference in pairs of equal seeds.

    Each is {"mean", "ci95", "n", "missing"} or None; ``watched``: it was not trained on.
    """

    name: str
    base: dict[str, Any] | None
    tuned: dict[str, Any] | None
    difference: dict[str, Any] | None
    watched: bool = False


def config(folder: Path | None) -> dict[str, Any]:
    """config.yaml as it is; {} without one."""
    text = text_of(folder, "config.yaml")
    try:
        loaded = safe_yaml.parse(text).value if text else None
    except safe_yaml.YamlError as error:
        raise BrokenFileError(f"{folder}/config.yaml: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def text_of(folder: Path | None, name: str) -> str | None:
    """A text file of a run, None if it has none."""
    path = folder / name if folder is not None else None
    return (
        path.read_text(encoding="utf-8", errors="replace")
        if path is not None and path.is_file()
        else None
    )


def metrics(folder: Path | None) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, null as NaN."""
    rows = _jsonl(folder / "metrics.jsonl") if folder is not None else []
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in rows
    ]


def results(folder: Path | None) -> list[Row]:
    """The rows of results.jsonl."""
    return _jsonl(folder / "results.jsonl") if folder is not None else []


def summary(folder: Path | None) -> dict[str, Any] | None:
    """summary.json, which is there when the evaluation has finished."""
    text = text_of(folder, "summary.json")
    return _object(text, f"{folder}/summary.json") if text else None


def sampled_steps(folder: Path | None) -> dict[int, list[Row]]:
    """Step -> rows of samples/step-N/samples.jsonl, each with its ``path``."""
    found: dict[int, list[Row]] = {}
    for lines in (
        sorted(folder.glob("samples/step-*/samples.jsonl"))
        if folder is not None
        else []
    ):
        step = int(lines.parent.name.removeprefix("step-"))
        found[step] = [
            {**row, "path": lines.parent / row["file"]} for row in _jsonl(lines)
        ]
    return found


def _jsonl(path: Path) -> list[Row]:
    """Every complete line: a torn last one, of a run that was killed or is running, is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [
        _object(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)
    ]


def _object(text: str, where: str) -> Row:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BrokenFileError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BrokenFileError(f"{where}: wants an object, {{...}}, got {text[:60]}")
    return found


def reward_names(folder: Path | None) -> list[str]:
    """Rewards of a GRPO run: each logs its mean, and its spread under its name with _std."""
    rows = metrics(folder)
    names = dict.fromkeys(
        name
        for row in rows
        for name in row
        if name.startswith("reward/") and f"{name}_std" in row
    )
    return [name.removeprefix("reward/") for name in names]


def weight_of(grpo: Path | None, reward: str) -> float | None:
    """The weight a GRPO run trained a reward with; None when its config does not say."""
    entry = (config(grpo).get("rewards") or {}).get(reward)
    return float(entry.get("weight", 1.0)) if isinstance(entry, dict) else None


def matched(base: Sequence[Row], tuned: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of two evaluations with the same prompt and the same seed, in the order of the first."""
    other = {(row["prompt"], row["seed"]): row for row in tuned}
    return [
        (row, other[key])
        for row in base
        if (key := (row["prompt"], row["seed"])) in other
    ]


def value_of(row: Row, column: str) -> float:
    """A reward, or one of its parts as "reward.part"; NaN where it is missing."""
    value = row["rewards"].get(column)
    if value is None and column not in row["rewards"]:
        for name, parts in row["parts"].items():
            if column.startswith(f"{name}."):
                value = parts.get(column.removeprefix(f"{name}."))
    return math.nan if value is None else float(value)


def compare(
    runs: Runs, columns: Iterable[str], *, after_dpo: bool = False
) -> list[Comparison]:
    """Base against tuned, or against what Flow-DPO made of it; intervals from their summaries, the difference by
    bootstrap over pairs of equal seeds.
    """
    folder = runs.dpo_tuned if after_dpo else runs.tuned
    before, after = summary(runs.base) or {}, summary(folder) or {}
    pairs = matched(results(runs.base), results(folder))
    rows = []
    for name in columns:
        change = [value_of(tuned, name) - value_of(base, name) for base, tuned in pairs]
        difference = (
            mean_ci95(change, seed=0).as_dict()
            if name in before and name in after and pairs
            else None
        )
        watched = weight_of(runs.grpo, name.partition(".")[0]) == 0.0
        rows.append(
            Comparison(name, before.get(name), after.get(name), difference, watched)
        )
    return rows


def columns_of(runs: Runs) -> list[str]:
    """Names in the summaries of base and tuned, rewards before their parts."""
    return list(
        dict.fromkeys([*(summary(runs.base) or {}), *(summary(runs.tuned) or {})])
    )


def seconds_by_phase(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """MEAN seconds a step by phase over the logged steps, without the first one, which warms up, if there are more."""
    later = list(rows[1:] or rows)
    names = dict.fromkeys(
        name for row in later for name in row if name.startswith("seconds/")
    )
    found = {
        name: [row[name] for row in later if name in row and math.isfinite(row[name])]
        for name in names
    }
    return {
        name.removeprefix("seconds/"): sum(v) / len(v) for name, v in found.items() if v
    }
