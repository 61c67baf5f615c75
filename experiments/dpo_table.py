"""What `experiments/reproduce_dpo.py` measured, as JSON and as a page of tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from alignment.pair_store import PairSet
from common.log import read_metrics
from experiments.dpo_arms import ARMS, TITLES, Size, forwards_of_pairs
from experiments.rm_table import shown
from launch.evaluation.intervals import Interval, difference_ci95, runs_ci95
from rm.prompt import DIMENSIONS

COMMAND = "python experiments/reproduce_dpo.py"
TOTAL = "shapes"
Scores = dict[
    str, dict[int, dict[str, list[float]]]
]  # arm -> seed -> column -> prompt by prompt


def read_scores(root: Path, seeds: Sequence[int], arms: Sequence[str]) -> Scores:
    """The oracle's total in [0, 1], and its five sub-dimensions from 0 to 2, of every held-out prompt's video."""
    found: Scores = {}
    for arm in arms:
        for seed in seeds:
            lines = (
                (root / f"seed{seed}" / arm / "eval" / "results.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            rows = sorted(
                (json.loads(line) for line in lines), key=lambda row: row["index"]
            )
            columns = {TOTAL: [row["rewards"][TOTAL] for row in rows]}
            columns |= {
                name: [row["parts"][TOTAL][name] for row in rows] for name in DIMENSIONS
            }
            found.setdefault(arm, {})[seed] = columns
    return found


def over_seeds(
    scores: Scores, arm: str, column: str, *, minus: str | None = None
) -> Interval:
    """MEAN over seeds and prompts, or the difference to another arm at the same seeds and prompts."""
    own, *others = [
        [[scores[one][seed][column]] for seed in scores[arm]]
        for one in (arm, minus)
        if one is not None
    ]
    return difference_ci95(own, *others, seed=0) if others else runs_ci95(own, seed=0)


def spent(folder: Path) -> float:
    """DiT samples of a training run, a backward counted as two."""
    rows = [
        row for row in read_metrics(folder / "metrics.jsonl") if "forwards/grad" in row
    ]
    return sum(row["forwards/no_grad"] + 3 * row["forwards/grad"] for row in rows)


def write_results(
    root: Path,
    out: Path,
    seeds: Sequence[int],
    size: Size,
    *,
    commit: str,
    minutes: float,
) -> str:
    """Write reproduce_dpo.json and .md into ``out``; the page."""
    arms = list(TITLES)
    scores = read_scores(root, seeds, arms)
    sets = [PairSet(root / f"seed{seed}" / "pairs") for seed in seeds]
    last = {
        arm: [
            read_metrics(root / f"seed{seed}" / arm / "metrics.jsonl")[-1]
            for seed in seeds
        ]
        for arm in ARMS
    }
    record: dict[str, Any] = {
        "command": COMMAND,
        "commit": commit,
        "minutes": round(minutes, 1),
    }
    record["pairs"] = [one.about["counts"] for one in sets]
    record["arms"] = {
        arm: {
            "oracle": over_seeds(scores, arm, TOTAL).as_dict(),
            "gain": over_seeds(scores, arm, TOTAL, minus="base").as_dict(),
            "seeds": {
                seed: round(fmean(columns[TOTAL]), 4)
                for seed, columns in scores[arm].items()
            },
            "sub_dimensions": {
                name: over_seeds(scores, arm, name).as_dict() for name in DIMENSIONS
            },
        }
        for arm in arms
    }
    for arm in arms[1:]:
        training = fmean(spent(root / f"seed{seed}" / arm) for seed in seeds)
        record["arms"][arm]["forwards"] = round(
            training + (forwards_of_pairs(size) if arm in ARMS else 0.0)
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "reproduce_dpo.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    page = _page(scores, record, seeds, TITLES, last)
    (out / "reproduce_dpo.md").write_text(page, encoding="utf-8")
    return page


def _page(
    scores: Scores,
    record: dict[str, Any],
    seeds: Sequence[int],
    titles: dict[str, str],
    last: dict[str, list[dict[str, float]]],
) -> str:
    count = len(scores["base"][seeds[0]][TOTAL])
    pairs = ", ".join(
        f"{one['pairs']} of {one['prompts']} prompts" for one in record["pairs"]
    )
    lines = [
        "# Learning from pairs against learning online, in miniature",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']} in {record['minutes']:.0f} minutes. DeScore judged eight "
        f"videos of each prompt; the best and the worst made a pair ({pairs}; the rest were too close). The tables "
        f"have the oracle, on which nobody was trained, on {count} held-out prompts over the seeds "
        f"{', '.join(map(str, seeds))}, with the 95 % interval of a bootstrap that draws seeds, then prompts; gains "
        "are taken prompt by prompt. DiT forwards count a backward as two, and the making of the pairs.",
        "",
        "| trained by | DiT forwards | oracle, 0 to 1 | gain on the base |",
        "|---|---|---|---|",
    ]
    for arm, title in titles.items():
        forwards = record["arms"][arm].get("forwards", "")
        gain = (
            "" if arm == "base" else shown(over_seeds(scores, arm, TOTAL, minus="base"))
        )
        lines.append(
            f"| {title} | {forwards} | {shown(over_seeds(scores, arm, TOTAL))} | {gain} |"
        )
    lines += [
        "",
        "## By sub-dimension, 0 to 2",
        "",
        f"| trained by | {' | '.join(DIMENSIONS)} |",
    ]
    lines.append("|---" * (len(DIMENSIONS) + 1) + "|")
    for arm, title in titles.items():
        lines.append(
            f"| {title} | {' | '.join(shown(over_seeds(scores, arm, name)) for name in DIMENSIONS)} |"
        )
    lines += ["", "## The last training step, mean over seeds", ""]
    names = (
        "loss",
        "accuracy",
        "chosen_change",
        "rejected_change",
        "push",
        "grad_norm",
    )
    lines += [f"| trained by | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, rows in last.items():
        cells = [
            f"{fmean(row[f'train/{name}'] for row in rows):.4f}"
            if f"train/{name}" in rows[0]
            else ""
            for name in names
        ]
        lines.append(f"| {titles[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
