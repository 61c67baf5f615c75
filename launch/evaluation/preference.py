"""Score both videos of preference pairs with a DeScore and compare with people's labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launch.evaluation.intervals import mean_ci95, statistic_ci95
from rm.metrics import preference_accuracy
from rm.prompt import parse_answer
from rm.text_rewards import quality_reward

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable, Row
    from launch.schemas.evaluation import RewardEvaluation
    from rm.data import Pair
    from rm.scorer import DeScoreScorer


def score_pairs(
    cfg: RewardEvaluation,
    pairs: Sequence[Pair],
    indices: list[int],
    table: ResultsTable,
) -> None:
    """Score this rank's pairs and add their rows to the table.

    A and B of a pair are in the same batch. A broken video costs its pair only.
    """
    from common.cli import user_errors
    from common.log import say
    from launch.compose import quiet
    from launch.evaluation.results_table import attempt, batches

    quiet()
    from rm.scorer import DeScoreScorer
    from rm.video_check import VideoChecker

    say(f"loading DeScore from {cfg.checkpoint}")
    with user_errors():
        scorer = DeScoreScorer.load(cfg.checkpoint, **cfg.options)
    with VideoChecker() as checker:

        def score(part: Sequence[Pair]) -> list[Row]:
            for pair in part:
                checker.require(pair.video_A, pair.video_B)
            return score_batch(scorer, part)

        for batch in batches(indices, cfg.batch, "evaluate"):
            part = [pairs[index] for index in batch]
            rows = []
            scored = attempt(score, part)
            for index, pair, fields in zip(batch, part, scored, strict=True):
                rows.append({"index": index, **describe_pair(pair, fields, cfg.out)})
            table.add(rows)


def score_batch(scorer: DeScoreScorer, pairs: Sequence[Pair]) -> list[Row]:
    """{reward_A, parts_A, cot_A, reward_B, parts_B, cot_B} of every pair."""
    from launch.evaluation.results_table import score_fields

    files = []
    prompts = []
    for pair in pairs:
        files += [pair.video_A, pair.video_B]
        prompts += [pair.prompt, pair.prompt]
    scores = {"descore": scorer.score(files, prompts)}
    rows: list[Row] = []
    for i in range(len(pairs)):
        row = {}
        for side, place in (("A", 2 * i), ("B", 2 * i + 1)):
            fields = score_fields(scores, place)
            row[f"reward_{side}"] = fields["rewards"]["descore"]
            row[f"parts_{side}"] = fields["parts"].get("descore")
            row[f"cot_{side}"] = fields["texts"].get("descore")
        rows.append(row)
    return rows


def describe_pair(pair: Pair, fields: Row, out: str) -> Row:
    """Add the pair's prompt, label and files, the quality of its CoTs and further labels.

    Files are relative to ``out``, because a run folder may be moved together with its data.
    """
    row = {"prompt": pair.prompt, "label": pair.label}
    row["video_A"] = os.path.relpath(pair.video_A, out)
    row["video_B"] = os.path.relpath(pair.video_B, out)
    return row | fields | quality(pair, fields) | labels(pair, fields)


def quality(pair: Pair, fields: Row) -> Row:
    """Share of right sub-dimension scores in each CoT, where the table has the right scores."""
    result = {}
    for side, truth in (("A", pair.scores_A), ("B", pair.scores_B)):
        cot = fields.get(f"cot_{side}")
        if truth and cot:
            result[f"quality_{side}"] = quality_reward(parse_answer(cot), truth)
    return result


def labels(pair: Pair, fields: Row) -> Row:
    """People's labels in each dimension of a reward model that has several."""
    parts = fields.get("parts_A") or {}
    names = [
        name.removeprefix("reward.") for name in parts if name.startswith("reward.")
    ]
    if not names:
        return {}
    known = {}
    for name in names:
        label = pair.label_in(name)
        if label in (1, -1, 0):
            known[name] = int(label)
    return {"labels": known}


def summarise_pairs(
    rows: Sequence[Row], *, seed: int, resamples: int
) -> dict[str, Any]:
    """Preference accuracy (`rm.metrics.preference_accuracy`) with a bootstrap over pairs.

    without_ties       Accuracy on the pairs that people decided; n is their number.
    with_ties          Accuracy with a threshold for ties, calibrated anew in each resample.
    without_ties.NAME  The first, for a dimension of a reward model that has several.
    sub_dimensions     Share of right scores in the CoTs, MEAN over the pairs that have it.

    A pair with a video that could not be scored is wrong in all of them and counts in ``unjudged``.
    """
    margin_N = _margins(rows)
    label_N = torch.tensor([row["label"] for row in rows])
    decided_N = label_N != 0

    def interval(field: str, margin_M: Tensor, label_M: Tensor) -> dict[str, Any]:
        def statistic(index: Any) -> float:
            chosen = torch.from_numpy(index)
            accuracy = preference_accuracy(margin_M[chosen], label_M[chosen])
            return getattr(accuracy, field)

        count = len(margin_M)
        result = statistic_ci95(statistic, count, seed=seed, resamples=resamples)
        return result.as_dict()

    summary: dict[str, Any] = {
        "without_ties": interval(
            "without_ties", margin_N[decided_N], label_N[decided_N]
        ),
        "with_ties": interval("with_ties", margin_N, label_N),
    }

    # Each dimension on the pairs that people decided in it.
    names = dict.fromkeys(name for row in rows for name in row.get("labels", {}))
    for name in names:
        decided = [row for row in rows if row.get("labels", {}).get(name)]
        label_M = torch.tensor([row["labels"][name] for row in decided])
        margin_M = _margins(decided, f"reward.{name}")
        summary[f"without_ties.{name}"] = interval("without_ties", margin_M, label_M)

    # The chains of thought, where both of a pair have a quality.
    qualities = []
    for row in rows:
        if "quality_A" in row and "quality_B" in row:
            qualities.append((row["quality_A"] + row["quality_B"]) / 2)
    if qualities:
        mean = mean_ci95(qualities, seed=seed, resamples=resamples)
        summary["sub_dimensions"] = mean.as_dict()
    summary["threshold"] = preference_accuracy(margin_N, label_N).threshold
    summary["pairs"] = len(rows)
    summary["ties"] = int((~decided_N).sum())
    summary["unjudged"] = int(margin_N.isnan().sum())
    return summary


def _margins(rows: Sequence[Row], part: str | None = None) -> Tensor:
    """Reward of A minus reward of B (or that of a part), NaN where either is missing."""
    margins = []
    for row in rows:
        sides = []
        for side in "AB":
            if part is None:
                value = row.get(f"reward_{side}")
            else:
                value = (row.get(f"parts_{side}") or {}).get(part)
            sides.append(math.nan if value is None else value)
        margins.append(sides[0] - sides[1])
    return torch.tensor(margins, dtype=torch.float64)
