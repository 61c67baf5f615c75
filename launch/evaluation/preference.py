"""Score both videos of preference pairs with a DeScore and compare with people's labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from launch.evaluation.intervals import mean_ci95, statistic_ci95
from rm.metrics import preference_accuracy
from rm.prompt import parse_answer
from rm.text_rewards import quality_reward

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable, Row
    from launch.schemas.evaluation import RewardEvaluation
    from rm.adaptive import AdaptiveScorer
    from rm.data import Pair
    from rm.metrics import PreferenceAccuracy
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
    from rm.adaptive import load_scorer
    from rm.video_check import VideoChecker

    say(f"loading DeScore from {cfg.checkpoint}")
    with user_errors():
        scorer = load_scorer(cfg.checkpoint, **cfg.options)
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


def score_batch(
    scorer: DeScoreScorer | AdaptiveScorer, pairs: Sequence[Pair]
) -> list[Row]:
    """Score both videos: {reward_A, parts_A, cot_A, reward_B, parts_B, cot_B} of every pair."""
    from launch.evaluation.results_table import score_fields

    # Videos A and B of pair i are at 2 i and 2 i + 1.
    files = []
    prompts = []
    for pair in pairs:
        files += [pair.video_A, pair.video_B]
        prompts += [pair.prompt, pair.prompt]
    # A scorer that thinks when unsure decides pair by pair, also where pairs share a prompt.
    options: dict[str, Any] = {}
    if getattr(scorer, "group_level", False):
        options["groups"] = [place // 2 for place in range(len(files))]
    scores = {"descore": scorer.score(files, prompts, **options)}
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
    thought            Share of pairs that a model with thinking=adaptive thought about.
    sub_dimensions     Share of right scores in the CoTs, MEAN over the pairs that have it.

    A pair with a video that could not be scored is wrong in all of them and counts in ``unjudged``.
    """

    def interval(
        field: str,
        part: Sequence[Row],
        name: str | None = None,
    ) -> dict[str, Any]:
        accuracy = _accuracy_of(part, name)
        return statistic_ci95(
            lambda index: getattr(accuracy(index), field),
            len(part),
            seed=seed,
            resamples=resamples,
        ).as_dict()

    # All dimensions together, without and with the pairs that people call equal.
    decided = [row for row in rows if row["label"]]
    summary: dict[str, Any] = {
        "without_ties": interval("without_ties", decided),
        "with_ties": interval("with_ties", rows),
    }
    # Each dimension on the pairs that people decided in it.
    for name in dict.fromkeys(name for row in rows for name in row.get("labels", ())):
        known = [row for row in rows if row.get("labels", {}).get(name)]
        summary[f"without_ties.{name}"] = interval("without_ties", known, name)

    # The chains of thought, where both of a pair have a quality.
    qualities = []
    for row in rows:
        if "quality_A" in row and "quality_B" in row:
            qualities.append((row["quality_A"] + row["quality_B"]) / 2)
    if qualities:
        mean = mean_ci95(qualities, seed=seed, resamples=resamples)
        summary["sub_dimensions"] = mean.as_dict()

    # The share of pairs that the model has thought about, where that was its choice.
    parts = [row.get("parts_A") or {} for row in rows]
    if any("thought" in part for part in parts):
        thought = [part.get("thought") for part in parts]
        mean = mean_ci95(thought, seed=seed, resamples=resamples)
        summary["thought"] = mean.as_dict()

    # The threshold for ties on all pairs, and counts.
    summary["threshold"] = _accuracy_of(rows)(slice(None)).threshold
    summary["pairs"] = len(rows)
    summary["ties"] = len(rows) - len(decided)
    summary["unjudged"] = sum(math.isnan(margin_of(row)) for row in rows)
    return summary


def _accuracy_of(
    rows: Sequence[Row], name: str | None = None
) -> Callable[[Any], PreferenceAccuracy]:
    """Return the accuracy, perhaps in a dimension, as a function of the rows' indices."""
    margins = [margin_of(row, name) for row in rows]
    margin_N = torch.tensor(margins, dtype=torch.float64)
    # The label of the pair stands under its name, those in dimensions under theirs.
    labels = [row["label"] if name is None else row["labels"][name] for row in rows]
    label_N = torch.tensor(labels)
    return lambda index: preference_accuracy(margin_N[index], label_N[index])


def margin_of(row: Row, name: str | None = None) -> float:
    """Reward of A minus reward of B (or in a dimension), NaN where either is missing."""
    rewards = [reward_of(row, side, name) for side in "AB"]
    return math.nan if None in rewards else rewards[0] - rewards[1]


def reward_of(
    row: Row,
    side: str,
    name: str | None = None,
) -> float | None:
    """Return the reward of a video, or that in a dimension; None where it is missing."""
    if name is None:
        return row.get(f"reward_{side}")
    # A pair that could not be scored has no parts.
    return (row.get(f"parts_{side}") or {}).get(f"reward.{name}")
