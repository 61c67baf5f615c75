"""VideoReward and HPSv3 as rewards: what of their numbers counts, and of which frames."""

from __future__ import annotations

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from alignment.rewards.videoreward import to_gray
from common.memory import AdaptiveBatcher
from rm.baselines.qwen2_vl import shared
from tests import public_checkpoints as public
from tests.tiny_qwen import random_frames

PROMPTS = ["a cat", "many dogs that run over a field of snow", "rain"]
VIDEO = torch.stack([random_frames(i, frames=8, size=56) for i in range(3)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return public.converted(tmp_path_factory.mktemp("public"))


def reward_of(kind: str, folders: dict[str, str], **options: object):
    (reward,) = build_rewards(
        {"it": RewardConfig(kind=kind, checkpoint=folders[kind], options=options)}
    ).values()
    return reward


def test_published_score_is_a_dimension_or_the_sum(folders: dict[str, str]) -> None:
    whole = reward_of("videoreward", folders).score(VIDEO, PROMPTS, fps=4.0)
    assert list(whole.parts) == ["VQ", "MQ", "TA"]
    torch.testing.assert_close(whole.value_B, sum(whole.parts.values()))
    for name in whole.parts:
        alone = reward_of("videoreward", folders, dimension=name).score(
            VIDEO, PROMPTS, fps=4.0
        )
        assert torch.equal(alone.value_B, whole.parts[name])
    reward_model = shared(folders["videoreward"], None, "float32")
    want = reward_model.read_video(VIDEO[1], PROMPTS[1], fps=4.0)
    assert [float(part[1]) for part in whole.parts.values()] == want.tolist()


def test_gray_equals_luma_by_hand(folders: dict[str, str]) -> None:
    pixel = torch.tensor(
        [[[[[255, 0, 0], [0, 255, 0], [10, 20, 30]]]]], dtype=torch.uint8
    )
    assert to_gray(pixel)[0, 0, 0].tolist() == [
        [76] * 3,
        [150] * 3,
        [18] * 3,
    ]  # 76.2, 149.7, 18.15
    gray = reward_of("videoreward", folders, gray=True)
    found = gray.score(VIDEO, PROMPTS, fps=4.0).value_B
    assert torch.equal(
        found,
        reward_of("videoreward", folders)
        .score(to_gray(VIDEO), PROMPTS, fps=4.0)
        .value_B,
    )
    assert not torch.allclose(
        found, reward_of("videoreward", folders).score(VIDEO, PROMPTS, fps=4.0).value_B
    )


def test_hpsv3_score_is_mean_of_best_frames(folders: dict[str, str]) -> None:
    reward_model = shared(folders["hpsv3"], None, "float32")
    mu = torch.stack(
        [
            reward_model.read_images(v, p, portions=AdaptiveBatcher(16, what="frames"))[
                :, 0
            ]
            for v, p in zip(VIDEO, PROMPTS, strict=True)
        ]
    )
    every = reward_of("hpsv3", folders).score(VIDEO, PROMPTS, fps=4.0).value_B
    torch.testing.assert_close(every, mu.mean(dim=1))
    best = reward_of("hpsv3", folders, best=0.3).score(VIDEO, PROMPTS, fps=4.0).value_B
    torch.testing.assert_close(
        best, mu.sort(dim=1).values[:, -3:].mean(dim=1)
    )  # 30 % of 8 are 2.4: 3
    ends = reward_of("hpsv3", folders, frames=2).score(VIDEO, PROMPTS, fps=4.0).value_B
    torch.testing.assert_close(ends, mu[:, [0, 7]].mean(dim=1))
    general = (
        reward_of("hpsv3", folders, prompt=PROMPTS[0], batch=3)
        .score(VIDEO, PROMPTS, fps=4.0)
        .value_B
    )
    torch.testing.assert_close(general[0], every[0])
    assert abs(float(general[1] - every[1])) > 1e-3


def test_two_rewards_share_the_weights(folders: dict[str, str]) -> None:
    configs = {
        "general": RewardConfig(
            "hpsv3",
            checkpoint=folders["hpsv3"],
            options={"prompt": "A high-quality image"},
        ),
        "percentile": RewardConfig(
            "hpsv3", checkpoint=folders["hpsv3"], options={"best": 0.3}
        ),
    }
    general, percentile = build_rewards(configs).values()
    assert general.reward_model is percentile.reward_model


def test_tempo_of_a_short_clip_is_reported_once(
    folders: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    reward = reward_of("videoreward", folders)
    reward.score(VIDEO[:1], PROMPTS[:1], fps=4.0)
    assert capsys.readouterr().out == ""  # 8 frames at 4 fps: 2 s, 4 of them
    for _ in range(2):
        reward.score(VIDEO[:1], PROMPTS[:1], fps=16.0)
    told = capsys.readouterr().out
    assert "6.9" in told
    assert told.count("videoreward:") == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "videoreward",
            {"dimension": "beauty"},
            "'beauty'",
        ),
        ("hpsv3", {"best": 0}, r"\bbest\b"),
        ("hpsv3", {"frames": 0}, r"\bframes\b"),
    ],
)
def test_what_cannot_be_is_named(
    kind: str, options: dict, message: str, folders: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message):
        reward_of(kind, folders, **options)
    with pytest.raises(ValueError, match="convert_reward"):
        build_rewards({kind: RewardConfig()})
