"""What `experiments/reproduce_grpo.py` measured, as JSON, as a page with a table, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common.log import read_metrics
from experiments.grpo_arms import ARMS, BASE, GrpoArmRun
from experiments.rm_table import figure_of, shown
from launch.evaluation.intervals import Interval, difference_ci95, runs_ci95

BACKWARD = 2  # forwards that a backward counts as
GROUPS = {
    "parts": (
        BASE,
        "no_reweight",
        "own_spread",
        "no_spread",
        "late",
        "untruncated",
        "no_kl",
        "members_4",
        "members_16",
    ),
    "sisters": (BASE, "flow_grpo", "mixgrpo", "flash_grpo", "flow_cps"),
    "tail": (BASE, "tail_euler", "tail_ab2", "tail_cache"),
}


@dataclass(frozen=True)
class GrpoOutcome:
    """Of one run.

    score    the oracle's value of every held-out prompt's video, in order
    curve    (DiT forwards so far, oracle on the first held-out prompts), before, in and after training
    forwards of the whole run, a backward counted as two
    rollout  median seconds of a step's rollouts
    """

    score: tuple[float, ...]
    curve: tuple[tuple[float, float], ...] = ()
    updates: int = 0
    videos: int = 0
    forwards: float = 0.0
    rollout: float = 0.0


def read_outcome(root: Path, run: GrpoArmRun) -> GrpoOutcome:
    """From the files of its evaluation and its training."""
    folder = run.folder(root)
    lines = (folder / "eval" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["index"])
    score = tuple(row["rewards"]["shapes"] for row in rows)
    if run.arm == "base":
        return GrpoOutcome(score)
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in metrics if "forwards/grad" in row]
    spent = [
        row["forwards/no_grad"] + (1 + BACKWARD) * row["forwards/grad"] for row in steps
    ]
    before = [0.0, *accumulate(spent)]
    curve = tuple(
        (before[int(row["step"])], row["eval/oracle"])
        for row in metrics
        if "eval/oracle" in row
    )
    rate = median(row["seconds/rollout"] for row in steps)
    videos = round(sum(row["videos_per_second"] * row["seconds/step"] for row in steps))
    return GrpoOutcome(score, curve, len(steps), videos, before[-1], rate)


def over_seeds(
    outcomes: dict[GrpoArmRun, GrpoOutcome], arm: str, *, minus: str | None = None
) -> Interval:
    """MEAN oracle of an arm over seeds and prompts, or its difference to another on the same seeds and prompts."""
    seeds = [run.seed for run in outcomes if run.arm == arm]
    own, *others = [
        [[outcomes[GrpoArmRun(seed, one)].score] for seed in seeds]
        for one in (arm, minus)
        if one is not None
    ]
    return difference_ci95(own, *others, seed=0) if others else runs_ci95(own, seed=0)


def write_results(
    root: Path,
    out: Path,
    runs: Sequence[GrpoArmRun],
    *,
    command: str,
    commit: str,
    minutes: float,
) -> str:
    """Write reproduce_grpo.json, .md and .svg into ``out``; the page."""
    outcomes = {run: read_outcome(root, run) for run in runs}
    arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if arm != "base"]
    rows = {arm: _row(outcomes, arm) for arm in ("base", *arms)}
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command,
        "commit": commit,
        "minutes": round(minutes, 1),
        "arms": rows,
    }
    (out / "reproduce_grpo.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    plot(outcomes, arms, out / "reproduce_grpo.svg")
    page = _page(outcomes, arms, rows, command=command, commit=commit, minutes=minutes)
    (out / "reproduce_grpo.md").write_text(page, encoding="utf-8")
    return page


def _row(outcomes: dict[GrpoArmRun, GrpoOutcome], arm: str) -> dict[str, Any]:
    found = {run.seed: one for run, one in outcomes.items() if run.arm == arm}
    row: dict[str, Any] = {"oracle": over_seeds(outcomes, arm).as_dict()}
    row["seeds"] = {seed: round(fmean(one.score), 4) for seed, one in found.items()}
    if arm != "base":
        row["gain"] = over_seeds(outcomes, arm, minus="base").as_dict()
        row["against the recipe"] = over_seeds(outcomes, arm, minus=BASE).as_dict()
        for name in ("updates", "videos", "forwards", "rollout"):
            row[name] = round(fmean(getattr(one, name) for one in found.values()), 3)
    return row


def groups_of(arms: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Those of `GROUPS` that compare something with the recipe."""
    return {
        title: members
        for title, members in GROUPS.items()
        if set(members) & set(arms) - {BASE}
    }


def _page(
    outcomes: dict[GrpoArmRun, GrpoOutcome],
    arms: Sequence[str],
    rows: dict[str, Any],
    *,
    command: str,
    commit: str,
    minutes: float,
) -> str:
    seeds = sorted({run.seed for run in outcomes})
    count = len(next(iter(outcomes.values())).score)
    lines = [
        "# What each part of Longcat-GRPO is worth, in miniature",
        "",
        f"Made by `{command}` at commit {commit} in {minutes:.0f} minutes. The tiny Wan learns from the exact oracle; "
        f"the table has the oracle's mean (0 to 1) on {count} held-out prompts after training, over the seeds "
        f"{', '.join(map(str, seeds))}, with the 95 % interval of a bootstrap that draws seeds, then prompts; "
        "differences are taken prompt by prompt. All arms but those of the tail spend the same number of DiT forwards, "
        "a backward counted as two; those of the tail make as many updates as the recipe. Rollout is the median of a "
        "step's, in seconds, two runs sharing two cores.",
        "",
        f"Before training: {shown(over_seeds(outcomes, 'base'))}.",
        "",
    ]
    for title, members in groups_of(arms).items():
        lines += [f"## {title.capitalize()}", ""]
        lines += [
            "| arm | updates | videos | DiT forwards | rollout | oracle | against the recipe |"
        ]
        lines += ["|---" * 7 + "|"]
        for arm in (arm for arm in members if arm in arms):
            row = rows[arm]
            cells = [
                f"{row['updates']:.0f}",
                f"{row['videos']:.0f}",
                f"{row['forwards']:.0f}",
                f"{row['rollout']:.2f}",
            ]
            gap = "" if arm == BASE else shown(over_seeds(outcomes, arm, minus=BASE))
            cells += [shown(over_seeds(outcomes, arm)), gap]
            lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} |")
        lines.append("")
    return (
        "\n".join([*lines, "![oracle against DiT forwards](reproduce_grpo.svg)"]) + "\n"
    )


def plot(
    outcomes: dict[GrpoArmRun, GrpoOutcome], arms: Sequence[str], path: Path
) -> None:
    """The oracle on held-out prompts against what was spent, MEAN over seeds."""
    groups = groups_of(arms)
    figure, axes = figure_of(max(2, len(groups)))
    for axis, (title, members) in zip(axes, groups.items(), strict=False):
        for arm in (arm for arm in members if arm in arms):
            curves = [one.curve for run, one in outcomes.items() if run.arm == arm]
            points = [
                [fmean(p) for p in zip(*points, strict=True)]
                for points in zip(*curves, strict=True)
            ]
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=2,
                lw=1,
                label=ARMS[arm].title,
            )
        axis.set(title=title, xlabel="DiT forwards", ylabel="oracle, held-out prompts")
        axis.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
