"""Reward plug-ins: found by name, and true on videos whose score is known."""

from __future__ import annotations

import random

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import REWARDS, build_rewards, factory_of
from common.types import RewardModel, Score
from toy import world as shapes

ORACLE = "toy/oracle.py:ShapesOracle"


def test_kind_defaults_to_the_name() -> None:
    rewards = build_rewards(
        {
            "brightness": RewardConfig(),
            "heldout": RewardConfig(kind="smoothness", weight=0.0),
        }
    )
    assert [(name, reward.name) for name, reward in rewards.items()] == [
        ("brightness", "brightness"),
        ("heldout", "smoothness"),
    ]
    assert all(isinstance(reward, RewardModel) for reward in rewards.values())


def test_kind_of_an_earlier_version_names_its_replacement() -> None:
    with pytest.raises(ValueError, match=ORACLE):
        build_rewards({"shapes": RewardConfig()})


def test_unknown_kind_names_the_nearest_and_the_known() -> None:
    with pytest.raises(
        ValueError,
        match="'descore'",
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
        (RewardConfig(kind="remote"), "`url`"),
        (
            RewardConfig(kind="generative", checkpoint="x"),
            r"options\.instruction",
        ),
        (
            RewardConfig(kind="brightness", options={"x": 1}),
            "Brightness",
        ),
        (
            RewardConfig(kind="hpsv3", checkpoint="x", options={"frame": 1}),
            r"\bframe\b",
        ),
        (
            RewardConfig(kind="hpsv3", checkpoint="x", options={"frames": 0}),
            r"\b1\.0\b",
        ),
        (
            RewardConfig(kind="hpsv3", checkpoint="x", options={"checkpoint": "y"}),
            "checkpoint",
        ),
    ],
)
def test_wrong_config_raises_a_line_with_the_users_name(
    cfg: RewardConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as found:
        build_rewards({"judge": cfg})
    assert str(found.value).startswith("rewards.judge: ")
    assert "\n" not in str(found.value)


def test_unknown_option_that_is_passed_on_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rm import adaptive

    class Scorer:
        @classmethod
        def load(cls, path: str, *, batch: int = 1) -> Scorer:
            return cls()

    monkeypatch.setattr(adaptive, "DeScoreScorer", Scorer)
    with pytest.raises(
        ValueError,
        match="'bacth'",
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
def test_url_that_is_no_address_raises(url: str) -> None:
    with pytest.raises(ValueError, match=r"rewards\.judge\.url"):
        factory_of("judge", RewardConfig(url=url))
    assert factory_of("judge", RewardConfig(url="https://host")) is REWARDS["remote"]


def test_descore_passes_on_folder_options_and_fps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rm import adaptive

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

    monkeypatch.setattr(adaptive, "DeScoreScorer", Scorer)
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


def test_oracle_by_target_prefers_the_right_video() -> None:
    rng = random.Random(0)
    attributes = shapes.random_attributes(rng)
    video_TYXC = shapes.render([shapes.random_scene(attributes, rng)])[0]
    blank_TYXC = torch.full_like(video_TYXC, 128)
    prompt = shapes.caption(attributes, wording=0)
    score = build_rewards({"shapes": RewardConfig(target=ORACLE)})["shapes"].score(
        torch.stack([video_TYXC, blank_TYXC]), [prompt] * 2, fps=8.0
    )
    assert score.value_B[0] == 1.0
    assert score.value_B[1] <= 0.4
    assert [float(score.parts[name][0]) for name in shapes.SUB_DIMENSIONS] == [2.0] * 5
