"""The people: a graded utility with a part that nothing states, and labels drawn from it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from toy.annotator import RIGHT, annotate, overall_score
from toy.make_pairs import SPLITS, hurt, worn
from toy.measure import measure
from toy.people import (
    PEOPLE,
    QUALITY_WEIGHT,
    WEIGHTS,
    People,
    PeopleUtility,
    utility,
    value_of,
)
from toy.world import (
    SUB_DIMENSIONS,
    Attributes,
    Scene,
    caption,
    random_attributes,
    random_scene,
    random_scenes,
    render,
    split_attributes,
)

RED = Attributes("red", "circle", "right", "panning", "grey", "vivid")
SCENE = Scene(RED, 0.2, 0.5, 0.5, 0.3, 0.05, 0.25, 0.0)
PROMPT = caption(RED, wording=0)


def draw(**changes: object) -> Tensor:
    """The video of `SCENE` with other attributes or other settings."""
    fields = {field.name for field in dataclasses.fields(Attributes)}
    mine = {name: value for name, value in changes.items() if name in fields}
    rest = {name: value for name, value in changes.items() if name not in fields}
    attributes = dataclasses.replace(RED, **mine)
    scene = dataclasses.replace(SCENE, attributes=attributes, **rest)
    return render([scene])[0]


def test_weights_are_a_share_each() -> None:
    assert sum(WEIGHTS.values()) + QUALITY_WEIGHT == pytest.approx(1.0)
    assert set(WEIGHTS) == set(SUB_DIMENSIONS)


def test_another_weight_of_the_quality_keeps_the_ratios_of_the_others() -> None:
    """At 0 and 1 only one kind of term is left; at the usual weight nothing changes."""
    seen = utility(draw(motion="left", color="yellow"), PROMPT)
    quality = seen.parts["quality"]
    stated = sum(WEIGHTS[name] * seen.grades[name] for name in SUB_DIMENSIONS)
    assert value_of(seen.grades, quality) == pytest.approx(seen.value)
    assert value_of(seen.grades, quality, 1.0) == pytest.approx(quality)
    assert value_of(seen.grades, quality, 0.0) == pytest.approx(stated / 0.5)


def test_a_clean_video_of_its_prompt_has_nearly_all_utility() -> None:
    seen = utility(draw(), PROMPT)
    assert min(seen.grades.values()) > 0.95
    assert min(seen.quality.values()) > 0.9
    want = sum(WEIGHTS[name] * seen.grades[name] for name in SUB_DIMENSIONS)
    want += QUALITY_WEIGHT * sum(seen.quality.values()) / 4
    assert seen.value == pytest.approx(want)


@pytest.mark.parametrize(
    ("changes", "name", "low", "high"),
    [
        # hue 60 of 120 degrees off is half of the colour, a quarter of the subject
        ({"color": "yellow"}, "subject", 0.72, 0.78),
        ({"color": "cyan"}, "subject", 0.45, 0.55),
        ({"motion": "left"}, "dynamics", 0.0, 0.0),
        ({"motion": "down"}, "dynamics", 0.0, 0.05),
        # half of the travel that is enough
        ({"travel": 0.12}, "dynamics", 0.45, 0.55),
        ({"camera": "fixed"}, "camera", 0.0, 0.05),
        ({"pan": 0.02}, "camera", 0.45, 0.55),
        # 70 of 100 levels of light
        ({"background": "dark"}, "environment", 0.27, 0.33),
        ({"background": "bright"}, "environment", 0.17, 0.23),
        ({"style": "pastel"}, "style", 0.0, 0.05),
    ],
)
def test_grade_falls_with_the_distance_and_the_others_stay(
    changes: dict[str, object], name: str, low: float, high: float
) -> None:
    before = utility(draw(), PROMPT)
    after = utility(draw(**changes), PROMPT)
    assert low <= after.grades[name] <= high
    for other in SUB_DIMENSIONS:
        if other != name:
            assert after.grades[other] == pytest.approx(before.grades[other], abs=0.05)


def test_what_the_prompt_does_not_name_has_its_full_grade() -> None:
    grades = utility(draw(), "a red circle").grades
    assert grades["dynamics"] == grades["camera"] == grades["style"] == 1.0


def test_noise_has_hardly_any_utility() -> None:
    noise = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    assert utility(noise, PROMPT).value < 0.15


def test_quality_falls_by_wear_that_the_oracle_does_not_see() -> None:
    rng = random.Random(0)
    scenes = random_scenes(60, rng)
    falls = []
    same = 0
    for scene, video in zip(scenes, render(scenes), strict=True):
        prompt = caption(scene.attributes, wording=0)
        spoilt = worn(video, 0.6, rng)
        falls.append(
            utility(video, prompt).parts["quality"]
            - utility(spoilt, prompt).parts["quality"]
        )
        same += measure(video, prompt).scores == measure(spoilt, prompt).scores
    assert sum(falls) / len(falls) > 0.15
    # the attributes are still read: wear belongs to the quality
    assert same >= 0.7 * len(scenes)


def test_still_and_grey_and_noise_are_all_hurt() -> None:
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(60):
        video = hurt(draw(), 1.0, rng)
        still = torch.equal(video[0], video[-1].to(video.dtype))
        grey = torch.equal(video[..., 0], video[..., 1])
        kinds[(bool(still), bool(grey))] += 1
    assert sorted(kinds) == [(False, False), (False, True), (True, False)]
    # Half of 60 are stills, within three standard deviations of 4.
    assert 18 <= kinds[True, False] <= 42


# Labels.


def test_probabilities_by_hand() -> None:
    """d = 1 at theta = 2: P(A) = 1 / (1 + 2 / e), P(B) = 1 / (1 + 2 e)."""
    people = People(temperature=0.1, theta=2.0)
    first, second, same = people.probabilities(0.1)
    assert first == pytest.approx(1 / (1 + 2 / math.e))
    assert second == pytest.approx(1 / (1 + 2 * math.e))
    assert first + second + same == pytest.approx(1.0)
    assert people.probabilities(0.0)[2] == pytest.approx(1 / 3)
    assert people.probabilities(-0.1)[:2] == (second, first)


def test_without_ties_the_model_is_bradley_terry() -> None:
    people = People(temperature=0.1, theta=1.0)
    first, _, same = people.probabilities(0.05)
    assert first == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert same == pytest.approx(0.0)


def test_labels_have_their_probabilities_and_best_accuracy() -> None:
    rng = random.Random(0)
    labels = Counter(PEOPLE.label(0.05, rng) for _ in range(20_000))
    first, second, same = PEOPLE.probabilities(0.05)
    for label, share in (("A", first), ("B", second), ("same", same)):
        error = 4 * math.sqrt(share * (1 - share) / 20_000)
        assert labels[label] / 20_000 == pytest.approx(share, abs=error)
    decided = labels["A"] + labels["B"]
    best = PEOPLE.best_accuracy(0.05)
    assert labels["A"] / decided == pytest.approx(best, abs=0.012)
    assert PEOPLE.best_accuracy(-0.05) == pytest.approx(best)
    assert PEOPLE.agreement(0.05) == pytest.approx(best**2 + (1 - best) ** 2)


# The annotator.


def test_annotator_is_right_in_its_share_and_never_off_the_scale() -> None:
    rng = random.Random(0)
    right = dict.fromkeys(SUB_DIMENSIONS, 1)
    total = Counter()
    for _ in range(4000):
        total.update(annotate(right, rng).values())
    share = total[1] / (4000 * len(SUB_DIMENSIONS))
    assert share == pytest.approx(RIGHT, abs=0.012)
    assert 0.75 <= RIGHT <= 0.80
    assert set(total) == {0, 1, 2}


@pytest.mark.parametrize(
    ("scores", "overall"),
    [
        ((2, 2, 2, 2, 2), 5.00),
        ((2, 2, 2, 2, 1), 4.825),
        ((2, 1, 2, 2, 2), 3.99),
        ((1, 1, 0, 0, 0), 3.00),
        ((2, 0, 1, 1, 1), 2.495),
        ((0, 1, 0, 0, 0), 2.00),
        ((0, 0, 2, 2, 2), 1.99),
        ((0, 0, 0, 0, 0), 1.00),
    ],
)
def test_overall_score_follows_the_instruction(
    scores: tuple[int, ...], overall: float
) -> None:
    named = dict(zip(SUB_DIMENSIONS, scores, strict=True))
    assert overall_score(named) == pytest.approx(overall)


# The reward that watches.


def test_reward_holds_the_utility_and_its_parts() -> None:
    rng = random.Random(1)
    scenes = [random_scene(random_attributes(rng), rng) for _ in range(3)]
    videos = render(scenes)
    prompts = [caption(scene.attributes, wording=1) for scene in scenes]
    score = PeopleUtility().score(videos, prompts, fps=8.0)
    for i, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        seen = utility(video, prompt)
        assert score.value_B[i].item() == pytest.approx(seen.value)
        for name, value in seen.parts.items():
            assert score.parts[name][i].item() == pytest.approx(value)


# No leak.


def test_looks_of_tests_are_those_of_no_training() -> None:
    """Sizes of shapes are drawn from ranges that do not meet."""
    from toy.world import Look

    ranges = {name: Look(**split.look).scale for name, split in SPLITS.items()}
    tested = {ranges["heldout"], ranges["renderer"]}
    trained = {ranges["train"], ranges["filmed"], Look().scale}
    for test, training in itertools.product(tested, trained):
        assert test[0] > training[1] or test[1] < training[0]
    # the base was trained with `Look()` and is tested on no such render
    for name in ("heldout", "indomain", "combinations", "renderer"):
        assert ranges[name][0] > Look().scale[1] or ranges[name][1] < Look().scale[0]


def test_no_training_of_a_base_model_draws_a_heldout_combination() -> None:
    from toy.build_wan import noisy_caption
    from toy.lessons import agreeing, examples
    from toy.world import parse

    heldout = set(split_attributes()[1])
    rng = random.Random(0)
    train = split_attributes()[0]
    for _ in range(500):
        text = noisy_caption(rng.choice(train), rng, wrong=0.55)
        assert parse(text) not in heldout
        assert agreeing(rng.choice(train), rng, 0.3) not in heldout
    assert not heldout & {scene.attributes for scene in random_scenes(500, rng)}
    _, wishes = examples(200, rng, clean=True)
    assert not heldout & set(wishes)
