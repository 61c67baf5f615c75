"""The rows of `launch/evaluate.py rm`: what a DeScore says of both videos of a pair, and how often people agree."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from launch.evaluation.intervals import mean_ci95, statistic_ci95
from rm.metrics import preference_accuracy
from rm.prompt import parse_answer
from rm.text_rewards import quality_reward

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable, Row
    from launch.schemas.evaluation import RewardEvaluation
    from rm.data import Pair


def judge_pairs(
    cfg: RewardEvaluation, pairs: Sequence[Pair], own: list[int], table: ResultsTable
) -> None:
    """Judge and write down this rank's pairs; A and B of a pair are in one batch. A broken video costs its pair."""
    from common.cli import user_errors
    from common.log import progress, say
    from launch.compose import quiet
    from launch.evaluation.results_table import attempt, batches, score_fields

    quiet()
    from rm.scorer import DeScoreScorer
    from rm.video_check import VideoChecker

    say(f"loading DeScore from {cfg.checkpoint}")
    with user_errors():
        scorer = DeScoreScorer.load(cfg.checkpoint, **cfg.options)

    def judge(part: Sequence[int]) -> list[Row]:
        files = [
            file
            for index in part
            for file in (pairs[index].video_A, pairs[index].video_B)
        ]
        checker.require(*files)
        score = scorer.score(
            files, [pairs[index].prompt for index in part for _ in "AB"]
        )
        sides = [score_fields({"descore": score}, b) for b in range(len(files))]
        return [
            {
                f"{what}_{side}": sides[2 * i + s][fields].get("descore")
                for s, side in enumerate("AB")
                for what, fields in (
                    ("reward", "rewards"),
                    ("parts", "parts"),
                    ("cot", "texts"),
                )
            }
            for i in range(len(part))
        ]

    def row(index: int, found: Row) -> Row:
        pair = pairs[index]
        # relative to results.jsonl: a run folder may be moved together with its data
        files = {
            f"video_{side}": os.path.relpath(getattr(pair, f"video_{side}"), cfg.out)
            for side in "AB"
        }
        about = {"index": index, "prompt": pair.prompt, "label": pair.label, **files}
        return {**about, **found, **quality(pair, found), **labels(pair, found)}

    with VideoChecker() as checker:
        for part in progress(
            batches(own, cfg.batch), -(-len(own) // cfg.batch), "evaluate"
        ):
            table.add(
                [
                    row(index, found)
                    for index, found in zip(part, attempt(judge, part), strict=True)
                ]
            )


def quality(pair: Pair, found: Row) -> Row:
    """Share of the right sub-dimension scores in both chains of thought, where the table knows what is right."""
    sides = (
        (side, getattr(pair, f"scores_{side}"), found.get(f"cot_{side}"))
        for side in "AB"
    )
    return {
        f"quality_{side}": quality_reward(parse_answer(cot), truth)
        for side, truth, cot in sides
        if truth and cot
    }


def labels(pair: Pair, found: Row) -> Row:
    """What people said in each dimension of a judge that has several, as far as they did."""
    names = [
        name.partition("reward.")[2]
        for name in found.get("parts_A") or {}
        if name.startswith("reward.")
    ]
    said = {
        name: int(pair.label_in(name))
        for name in names
        if pair.label_in(name) in (1, -1, 0)
    }
    return {"labels": said} if names else {}


def summarise_pairs(
    rows: Sequence[Row], *, seed: int, resamples: int
) -> dict[str, Any]:
    """Preference accuracy as `rm.metrics.preference_accuracy` defines it, with bootstrap over pairs.

    without_ties  n is the number of pairs that people decided; in each resample the same statistic of the drawn pairs
    with_ties     the threshold is calibrated anew in each resample, as it is on the data
    A pair with an unjudged video is wrong in both, and counted in ``unjudged``.
    without_ties.NAME  the same of one dimension's reward and labels, for a judge that has several
    sub_dimensions     share of right scores in the chains of thought, if the table knows them; MEAN over its pairs
    """

    def reward(row: Row, side: str, name: str | None = None) -> float:
        of_one = name is not None
        value = (
            (row.get(f"parts_{side}") or {}).get(f"reward.{name}")
            if of_one
            else row.get(f"reward_{side}")
        )
        return math.nan if value is None else value

    def margins(rows: Sequence[Row], name: str | None = None) -> torch.Tensor:
        return torch.tensor(
            [reward(row, "A", name) - reward(row, "B", name) for row in rows],
            dtype=torch.float64,
        )

    margin_N, label_N = margins(rows), torch.tensor([row["label"] for row in rows])
    decided_N = label_N != 0

    def interval(
        field: str, margin_M: torch.Tensor, label_M: torch.Tensor
    ) -> dict[str, Any]:
        def statistic(index: Any) -> float:
            chosen = torch.from_numpy(index)
            return getattr(
                preference_accuracy(margin_M[chosen], label_M[chosen]), field
            )

        return statistic_ci95(
            statistic, len(margin_M), seed=seed, resamples=resamples
        ).as_dict()

    by_dimension = {}
    for name in dict.fromkeys(name for row in rows for name in row.get("labels", {})):
        decided = [row for row in rows if row.get("labels", {}).get(name)]
        label_M = torch.tensor([row["labels"][name] for row in decided])
        by_dimension[f"without_ties.{name}"] = interval(
            "without_ties", margins(decided, name), label_M
        )
    thought = [
        (row["quality_A"] + row["quality_B"]) / 2
        for row in rows
        if {"quality_A", "quality_B"} <= row.keys()
    ]
    return {
        "without_ties": interval(
            "without_ties", margin_N[decided_N], label_N[decided_N]
        ),
        "with_ties": interval("with_ties", margin_N, label_N),
        **by_dimension,
        **(
            {
                "sub_dimensions": mean_ci95(
                    thought, seed=seed, resamples=resamples
                ).as_dict()
            }
            if thought
            else {}
        ),
        "threshold": preference_accuracy(margin_N, label_N).threshold,
        "pairs": len(rows),
        "ties": int((~decided_N).sum()),
        "unjudged": int(margin_N.isnan().sum()),
    }
