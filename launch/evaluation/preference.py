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
        # Another process decodes each file first: a file that kills its decoder costs a row.
        def score(part: Sequence[Pair]) -> list[Row]:
            for pair in part:
                checker.require(pair.video_A, pair.video_B)
            return score_batch(scorer, part)

        for batch in batches(indices, cfg.batch, "evaluate"):
            part = [pairs[index] for index in batch]
            scored = attempt(score, part)
            rows = []
            for index, pair, fields in zip(batch, part, scored, strict=True):
                described = describe_pair(pair, fields, cfg.out)
                rows.append({"index": index, **described})
            table.add(rows)


def score_batch(scorer: DeScoreScorer, pairs: Sequence[Pair]) -> list[Row]:
    """Score both videos: {reward_A, parts_A, cot_A, reward_B, parts_B, cot_B} of every pair."""
    from launch.evaluation.results_table import score_fields

    # Videos A and B of pair i are at 2 i and 2 i + 1.
    files = []
    prompts = []
    for pair in pairs:
        files += [pair.video_A, pair.video_B]
        prompts += [pair.prompt, pair.prompt]
    scores = {"descore": scorer.score(files, prompts)}
    rows: list[Row] = [{} for _ in pairs]
    for place in range(len(files)):
        fields = score_fields(scores, place)
        side = "AB"[place % 2]
        row = rows[place // 2]
        row[f"reward_{side}"] = fields["rewards"]["descore"]
        row[f"parts_{side}"] = fields["parts"].get("descore")
        row[f"cot_{side}"] = fields["texts"].get("descore")
    return rows


def describe_pair(
    pair: Pair,
    fields: Row,
    out: str,
) -> Row:
    """Add the pair's prompt, label and files, the quality of its CoTs and further labels.

    Files are relative to ``out``, because a run folder may be moved together with its data.
    """
    row = {
        "prompt": pair.prompt,
        "label": pair.label,
        "video_A": os.path.relpath(pair.video_A, out),
        "video_B": os.path.relpath(pair.video_B, out),
    }
    return row | fields | quality(pair, fields) | labels(pair, fields)


def quality(pair: Pair, fields: Row) -> Row:
    """Share of right sub-dimension scores in each CoT, where the table has the right scores."""
    result = {}
    truths = {"A": pair.scores_A, "B": pair.scores_B}
    for side, truth in truths.items():
        cot = fields.get(f"cot_{side}")
        if truth and cot:
            answer = parse_answer(cot)
            result[f"quality_{side}"] = quality_reward(answer, truth)
    return result


def labels(pair: Pair, fields: Row) -> Row:
    """People's labels in each dimension of a reward model that has several."""
    # Such a model has a part "reward.NAME" for each dimension.
    parts = fields.get("parts_A") or {}
    prefix = "reward."
    names = [part.removeprefix(prefix) for part in parts if part.startswith(prefix)]
    if not names:
        return {}
    known = {}
    for name in names:
        label = pair.label_in(name)
        if label in (1, -1, 0):
            known[name] = int(label)
    return {"labels": known}


def summarise_pairs(
    rows: Sequence[Row],
    *,
    seed: int,
    resamples: int,
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

    def interval(
        field: str,
        margin_M: Tensor,
        label_M: Tensor,
    ) -> dict[str, Any]:
        def statistic(index: Any) -> float:
            chosen = torch.from_numpy(index)
            accuracy = preference_accuracy(margin_M[chosen], label_M[chosen])
            return getattr(accuracy, field)

        result = statistic_ci95(
            statistic,
            len(margin_M),
            seed=seed,
            resamples=resamples,
        )
        return result.as_dict()

    # All dimensions together, without and with the pairs that people call equal.
    decided_margin_M = margin_N[decided_N]
    decided_label_M = label_N[decided_N]
    summary: dict[str, Any] = {
        "without_ties": interval("without_ties", decided_margin_M, decided_label_M),
        "with_ties": interval("with_ties", margin_N, label_N),
    }

    # Each dimension on the pairs that people decided in it.
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.get("labels", ()))
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

    # The threshold for ties on all pairs, and counts.
    summary["threshold"] = preference_accuracy(margin_N, label_N).threshold
    summary["pairs"] = len(rows)
    summary["ties"] = int((~decided_N).sum())
    summary["unjudged"] = int(margin_N.isnan().sum())
    return summary


def _margins(rows: Sequence[Row], part: str | None = None) -> Tensor:
    """Reward of A minus reward of B (or that of a part), NaN where either is missing."""
    values_A = _values(rows, "A", part)
    values_B = _values(rows, "B", part)
    return values_A - values_B


def _values(
    rows: Sequence[Row],
    side: str,
    part: str | None,
) -> Tensor:
    """Rewards of the videos of a side, or a part of them, in float64."""
    values = []
    for row in rows:
        if part is None:
            value = row.get(f"reward_{side}")
        else:
            # A pair that could not be scored has no parts.
            parts = row.get(f"parts_{side}") or {}
            value = parts.get(part)
        values.append(math.nan if value is None else value)
    return torch.tensor(values, dtype=torch.float64)
