"""Rule rewards of a chain of thought: did it judge right, in the right form, at a fair length (2605.05922; spec 3.3).

    R = w_quality R_quality + w_format R_format + w_length R_length + w_preference R_preference

Pure functions of text and numbers. In DeScore the last weight is 0: the preference label reaches the head through
Bradley-Terry only. The coupled generative baseline is the other way round, see `preference_rewards`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rm.config import RuleRewardConfig
from rm.prompt import Answer, parse_answer

Scores = Mapping[
    str, int | None
]  # 2, 1, 0, or None for "not applicable", by sub-dimension
# the official release's steps: the first bound that the length stays under decides
_STEPS = ((500, 0.0), (1000, 0.2), (1500, 0.4), (2000, 0.6))


@dataclass(frozen=True)
class RuleReward:
    """The parts in [0, 1] and their weighted SUM; ``overall`` is the score the chain states, if it states one."""

    total: float
    quality: float
    format: float
    length: float
    preference: float = 0.0
    overall: float | None = None


def rule_reward(
    text: str, truth: Scores, *, tokens: int, how: RuleRewardConfig
) -> RuleReward:
    """Judge one chain of thought; ``tokens`` is its length without the end-of-turn token."""
    answer = parse_answer(text)
    quality = quality_reward(answer, truth)
    form = format_reward(text, think_tags=how.think_tags)
    size = tokens if how.length_unit == "tokens" else len(text.strip())
    length = length_reward(
        size, low=how.length_low, high=how.length_high, shape=how.length_shape
    )
    total = how.quality * quality + how.format * form + how.length * length
    return RuleReward(
        total, quality, form, length, overall=None if answer is None else answer.overall
    )


def quality_reward(answer: Answer | None, truth: Scores) -> float:
    """Correct / asked: the share of the TRUTH's sub-dimensions that the answer scores the same, "2" being 2.

    "Not applicable" agrees with "not applicable" only. No answer, or a truth without any dimension, is 0.
    """
    if answer is None or not truth:
        return 0.0
    missing = object()
    return sum(
        answer.scores.get(name, missing) == score for name, score in truth.items()
    ) / len(truth)


def format_reward(text: str, *, think_tags: bool = False) -> float:
    """1 if there is a readable answer block (and, if asked for, one <think> block that closes before it), else 0."""
    if parse_answer(text) is None:
        return 0.0
    if not think_tags:
        return 1.0
    thought = text[: text.rfind("<answer>")]
    return float(
        thought.count("<think>") == thought.count("</think>") == 1
        and "<think>" in thought.split("</think>")[0]
    )


def length_reward(
    length: int, *, low: int, high: int, shape: Literal["linear", "steps"]
) -> float:
    """In [0, 1], see `RuleRewardConfig`."""
    if shape == "linear":
        return min(1.0, max(0.0, (length - low) / (high - low)))
    return next((value for bound, value in _STEPS if length < bound * high / 2000), 1.0)


def preference_rewards(
    overall_A: Sequence[float | None], overall_B: Sequence[float | None], label: int
) -> tuple[list[float], list[float]]:
    """For each chain, the share of the OTHER video's chains that its written overall score stands right against.

    label  1: A's must be higher, -1: B's, 0: both the same. A chain without a score is right against none.

    The baseline that couples thought and score (2605.05922, Figure 1): no head, GRPO on this alone. The paper does not
    say what its reward was; this is the win rate between the two groups.
    """

    def right(a: float | None, b: float | None) -> bool:
        return a is not None and b is not None and ((a > b) - (a < b)) == label

    of_A = [sum(right(a, b) for b in overall_B) / len(overall_B) for a in overall_A]
    of_B = [sum(right(a, b) for a in overall_A) / len(overall_A) for b in overall_B]
    return of_A, of_B
