"""Rule rewards of a chain of thought (CoT): correctness, format, length (arXiv 2605.05922).

    R = w_quality R_quality + w_format R_format + w_length R_length + w_preference R_preference

Pure functions of text and numbers. In DeScore the last weight is 0: the preference label
reaches the head through Bradley-Terry only. The coupled generative baseline uses the last
term alone, see `preference_rewards`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rm.config import RuleRewardConfig
from rm.prompt import Answer, parse_answer

# 2, 1, 0, or None for "not applicable", by sub-dimension
Scores = Mapping[str, int | None]
# (length, reward) of the official release: the first bound above the length decides.
_STEPS = ((500, 0.0), (1000, 0.2), (1500, 0.4), (2000, 0.6))


@dataclass(frozen=True)
class RuleReward:
    """The parts in [0, 1] and their weighted SUM.

    ``overall`` is the overall score that the CoT states, None if it states none.
    """

    total: float
    quality: float
    format: float
    length: float
    preference: float = 0.0
    overall: float | None = None


def rule_reward(
    text: str, truth: Scores, *, tokens: int, how: RuleRewardConfig
) -> RuleReward:
    """Reward a CoT; ``tokens`` is its length without the end-of-turn token."""
    answer = parse_answer(text)
    quality = quality_reward(answer, truth)
    form = format_reward(text, think_tags=how.think_tags)
    size = tokens if how.length_unit == "tokens" else len(text.strip())
    length = length_reward(
        size, low=how.length_low, high=how.length_high, shape=how.length_shape
    )
    total = how.quality * quality + how.format * form + how.length * length
    overall = None if answer is None else answer.overall
    return RuleReward(total, quality, form, length, overall=overall)


def quality_reward(answer: Answer | None, truth: Scores) -> float:
    """Share of the ground truth's sub-dimensions that the answer scores the same.

    "Not applicable" agrees with "not applicable" only. No answer, or a truth without any
    sub-dimension, gives 0.
    """
    if answer is None or not truth:
        return 0.0
    correct = 0
    for name, score in truth.items():
        if name in answer.scores and answer.scores[name] == score:
            correct += 1
    return correct / len(truth)


def format_reward(text: str, *, think_tags: bool = False) -> float:
    """1 if there is a readable answer block, else 0.

    With ``think_tags`` it also needs exactly one <think> block that closes before the answer.
    """
    if parse_answer(text) is None:
        return 0.0
    if not think_tags:
        return 1.0
    thought = text[: text.rfind("<answer>")]
    if thought.count("<think>") != 1 or thought.count("</think>") != 1:
        return 0.0
    return float(thought.index("<think>") < thought.index("</think>"))


def length_reward(
    length: int, *, low: int, high: int, shape: Literal["linear", "steps"]
) -> float:
    """Length reward in [0, 1], see `RuleRewardConfig`."""
    if shape == "linear":
        return min(1.0, max(0.0, (length - low) / (high - low)))
    for bound, reward in _STEPS:
        if length < bound * high / 2000:
            return reward
    return 1.0


def preference_rewards(
    overall_A: Sequence[float | None], overall_B: Sequence[float | None], label: int
) -> tuple[list[float], list[float]]:
    """Win rates of each CoT's overall score against the CoTs of the other video.

    label  1: A's score must be higher, -1: B's, 0: both must be equal. A CoT without a score
           agrees with none.

    The baseline that couples thought and score (arXiv 2605.05922, figure 1) has no head and
    runs GRPO on this term alone. The paper does not define its reward; this is the win rate
    between the two groups.
    """

    def agrees(a: float | None, b: float | None) -> bool:
        if a is None or b is None:
            return False
        return (a > b) - (a < b) == label

    rates_A = []
    for a in overall_A:
        rates_A.append(sum(agrees(a, b) for b in overall_B) / len(overall_B))
    rates_B = []
    for b in overall_B:
        rates_B.append(sum(agrees(a, b) for a in overall_A) / len(overall_A))
    return rates_A, rates_B
