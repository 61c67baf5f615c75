"""Reward plug-ins: found by name, and true on videos whose score is known."""

from __future__ import annotations

import random

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import REWARDS, build_rewards, factory_of
from common.types import RewardModel, Score
from toy import world as shapes


def test_a_kind_defaults_to_the_name_and_may_differ_from_it() -> None:
    rewards = build_rewards(
        {"brightness": RewardConfig(), "judge": RewardConfig(kind="shapes", weight=0.0)}
    )
    assert [(name, reward.name) for name, reward in rewards.items()] == [
        ("brightness", "brightness"),
        ("judge", "shapes"),
    ]
    assert all(isinstance(reward, RewardModel) for reward in rewards.values())


def test_an_unknown_kind_names_the_nearest_and_the_known() -> None:
    with pytest.raises(
        ValueError,
        match=r"rewards\.mine: unknown kind 'descor', known are .*did you mean 'descore'",
    ) as e:
        build_rewards({"mine": RewardConfig(kind="descor")})
    assert all(name in str(e.value) for name in REWARDS)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (RewardConfig(kind="descore"), "a descore reward needs `checkpoint`"),
        (RewardConfig(kind="similarity"), "a similarity reward needs `checkpoint`"),
        (
            RewardConfig(kind="similarity", checkpoint="./gone"),
            r"there is no folder \./gone",
        ),
        (RewardConfig(kind="videoreward"), "a videoreward reward needs `checkpoint`"),
        (
            RewardConfig(kind="hpsv3", checkpoint="gone"),
            r"gone/judge\.json: no such file; launch/convert_reward\.py",
        ),
        (RewardConfig(kind="remote"), "a remote reward needs `url`"),
        (
            RewardConfig(kind="generative", checkpoint="x"),
            r"a generative reward needs options\.instruction",
        ),
        (
            RewardConfig(kind="brightness", options={"x": 1}),
            "Brightness takes no x; it has no options",
        ),
        (
            RewardConfig(kind="niqe", options={"frame": 1}),
            "Niqe takes no frame; its options are frames",
        ),
        (
            RewardConfig(kind="niqe", options={"frames": 0}),
            "niqe needs frames >= 1, got 0",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_with_the_users_name(
    cfg: RewardConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^rewards\.judge: {message}") as found:
        build_rewards({"judge": cfg})
    assert "\n" not in str(found.value)


def test_options_that_are_handed_on_are_looked_at_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from alignment.rewards import descore

    class Scorer:
        @classmethod
        def load(cls, path: str, *, batch: int = 1) -> Scorer:
            return cls()

    monkeypatch.setattr(descore, "DeScoreScorer", Scorer)
    with pytest.raises(
        ValueError,
        match=r"^rewards\.judge: folder: options .* unexpected keyword argument 'bacth'",
    ):
        build_rewards(
            {
                "judge": RewardConfig(
                    kind="descore", checkpoint="folder", options={"bacth": 4}
                )
            }
        )


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8911", "localhost:8900", "http://", "ftp://host"]
)
def test_a_url_that_is_no_address_is_refused_with_the_config(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^rewards\.judge\.url must be http://host:port, got "
    ):
        factory_of("judge", RewardConfig(url=url))
    assert factory_of("judge", RewardConfig(url="https://host")) is REWARDS["remote"]


def test_descore_hands_on_folder_options_and_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from alignment.rewards import descore

    seen = []

    class Scorer:
        @classmethod
        def load(cls, path: str, **options: object) -> Scorer:
            seen.append((path, options))
            return cls()

        def score(
            self, videos: torch.Tensor, prompts: list[str], *, fps: float
        ) -> Score:
            seen.append((tuple(videos.shape), prompts, fps))
            return Score(torch.tensor([0.5, float("nan")]), texts=["seen", ""])

    monkeypatch.setattr(descore, "DeScoreScorer", Scorer)
    reward = build_rewards(
        {
            "judge": RewardConfig(
                kind="descore", checkpoint="folder", options={"batch": 4}
            )
        }
    )["judge"]
    score = reward.score(
        torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8), ["a", "b"], fps=8.0
    )
    assert seen == [("folder", {"batch": 4}), ((2, 3, 4, 4, 3), ["a", "b"], 8.0)]
    assert score.texts == ["seen", ""]


def test_brightness_of_known_frames() -> None:
    video_BTYXC = torch.zeros(3, 2, 4, 4, 3, dtype=torch.uint8)
    video_BTYXC[1] = 255
    video_BTYXC[2, ..., 0] = 51  # a fifth of red only: 1 / 15 of white
    value_B = (
        REWARDS["brightness"](RewardConfig())
        .score(video_BTYXC, ["", "", ""], fps=8.0)
        .value_B
    )
    assert value_B.tolist() == pytest.approx([0.0, 1.0, 1 / 15])


def test_the_oracle_prefers_what_was_asked() -> None:
    rng = random.Random(0)
    attributes = shapes.random_attributes(rng)
    video_TYXC = shapes.render([shapes.random_scene(attributes, rng)])[0]
    blank_TYXC = torch.full_like(video_TYXC, 128)
    prompt = shapes.caption(attributes, wording=0)
    score = REWARDS["shapes"](RewardConfig()).score(
        torch.stack([video_TYXC, blank_TYXC]), [prompt] * 2, fps=8.0
    )
    assert score.value_B[0] == 1.0
    assert score.value_B[1] <= 0.4
    assert [float(score.parts[name][0]) for name in shapes.SUB_DIMENSIONS] == [2.0] * 5
