"""Rule rewards: numbers by hand, and the traps of the official release."""

from __future__ import annotations

import json

import pytest

from rm.prompt import parse_answer
from rm.text_rewards import (
    RuleRewardConfig,
    format_reward,
    length_reward,
    preference_rewards,
    quality_reward,
    rule_reward,
)

TRUTH = {"subject": 2, "dynamics": 1, "camera": None, "environment": 0, "style": 2}


def chain(scores: dict[str, object], before: str = "seen\n") -> str:
    answer = json.dumps({"dimensional_scores": scores, "overall_score": "3.00"})
    return f"{before}<answer>{answer}</answer>"


def test_quality_is_the_share_of_the_truths_dimensions() -> None:
    said = {
        "subject": "2",
        "dynamics": "0",
        "camera": "N/A",
        "environment": "0",
        "style": "1",
    }
    assert quality_reward(parse_answer(chain(said)), TRUTH) == pytest.approx(3 / 5)
    assert quality_reward(
        parse_answer(chain({"subject": "2"})), TRUTH
    ) == pytest.approx(1 / 5)
    assert quality_reward(
        parse_answer(chain({**said, "mood": "2"})), TRUTH
    ) == pytest.approx(3 / 5)
    assert quality_reward(None, TRUTH) == 0.0
    assert quality_reward(parse_answer(chain(said)), {}) == 0.0


def test_not_applicable_counts_as_answered() -> None:
    assert quality_reward(parse_answer(chain({})), {"camera": None}) == 0.0
    assert (
        quality_reward(parse_answer(chain({"camera": "N/A"})), {"camera": None}) == 1.0
    )
    assert quality_reward(parse_answer(chain({"camera": "N/A"})), {"camera": 0}) == 0.0


def test_defect_15_score_type_does_not_change_reward() -> None:
    words = chain({"subject": "2", "dynamics": "1"})
    numbers = chain({"subject": 2, "dynamics": 1.0})
    truth = {"subject": 2, "dynamics": 1}
    assert (
        quality_reward(parse_answer(words), truth)
        == quality_reward(parse_answer(numbers), truth)
        == 1.0
    )


def test_defect_15_padding_with_spaces_earns_nothing() -> None:
    how = RuleRewardConfig(length_unit="characters")
    text = chain({"subject": "2"}, before="x" * 1000)
    plain, padded = (
        rule_reward(text, TRUTH, tokens=1, how=how),
        rule_reward(text + " " * 5000, TRUTH, tokens=1, how=how),
    )
    assert plain == padded


@pytest.mark.parametrize(
    ("length", "linear", "steps"),
    [
        (0, 0, 0),
        (499, 0, 0),
        (500, 0, 0.2),
        (999, 499 / 1500, 0.2),
        (1250, 0.5, 0.4),
        (1999, 1499 / 1500, 0.6),
        (2000, 1, 1),
    ],
)
def test_length(length: int, linear: float, steps: float) -> None:
    assert length_reward(length, low=500, high=2000, shape="linear") == pytest.approx(
        linear
    )
    assert length_reward(length, low=500, high=2000, shape="steps") == pytest.approx(
        steps
    )


def test_format() -> None:
    good = chain({"subject": "2"})
    assert format_reward(good) == 1.0
    assert format_reward(good.removesuffix("</answer>")) == 0.0
    assert format_reward('<answer>{"overall_score": 3}</answer>') == 0.0
    assert format_reward(good, think_tags=True) == 0.0
    assert format_reward(f"<think>a</think>{good}", think_tags=True) == 1.0
    assert format_reward(f"</think>a<think>{good}", think_tags=True) == 0.0
    assert (
        format_reward(f"<think>a</think><think>b</think>{good}", think_tags=True) == 0.0
    )


def test_the_total_is_the_weighted_sum() -> None:
    said = {
        "subject": "2",
        "dynamics": "0",
        "camera": "N/A",
        "environment": "0",
        "style": "1",
    }
    found = rule_reward(chain(said), TRUTH, tokens=1250, how=RuleRewardConfig())
    assert (found.quality, found.format, found.length) == pytest.approx((0.6, 1.0, 0.5))
    assert found.total == pytest.approx(0.7 * 0.6 + 0.1 * 1.0 + 0.2 * 0.5)
    garbage = rule_reward(
        "no answer at all", TRUTH, tokens=3000, how=RuleRewardConfig()
    )
    assert garbage.total == pytest.approx(0.2)


def test_preference_rewards_are_win_rates_between_the_groups() -> None:
    # Scores of A: 4, 3, nothing, 2; of B: 3, 1. A is better:
    # 4 beats both, 3 and 2 beat 1 only.
    of_A, of_B = preference_rewards([4.0, 3.0, None, 2.0], [3.0, 1.0], 1)
    assert of_A == [1.0, 0.5, 0.0, 0.5]
    assert of_B == [1 / 4, 3 / 4]
    swapped = preference_rewards([3.0, 1.0], [4.0, 3.0, None, 2.0], -1)
    assert swapped == (of_B, of_A)
    assert preference_rewards([3.0, 2.0], [3.0, None], 0) == ([0.5, 0.0], [0.5, 0.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"quality": -1.0},
        {"length_unit": "words"},
        {"length_shape": "cubic"},
        {"length_low": 9, "length_high": 9},
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RuleRewardConfig(**wrong)
