"""launch/check_rewards.py: the corruptions, and a reward that prefers wrong videos fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignment import reward_check
from alignment.reward_check import (
    CASES,
    RewardClip,
    SensitivityResult,
    check,
    score_clips,
    spoil,
)
from common.types import Score
from common.video_io import write_mp4
from launch import check_rewards
from toy.oracle import ShapesOracle
from toy.world import FPS, caption, random_attributes, random_scene, render


def worlds(count: int = 6) -> list[RewardClip]:
    """Renders with their captions."""
    import random

    rng = random.Random(5)
    attributes = [random_attributes(rng) for _ in range(count)]
    videos = render([random_scene(one, rng) for one in attributes])
    return [
        RewardClip(video, float(FPS), caption(one, wording=0))
        for video, one in zip(videos, attributes, strict=True)
    ]


def test_each_case_corrupts_videos_as_its_name_says() -> None:
    clips = worlds(3)
    wrong = spoil(clips, "wrong prompt")
    assert [clip.prompt for clip in wrong] == [
        clips[1].prompt,
        clips[2].prompt,
        clips[0].prompt,
    ]
    frozen, back = (
        spoil(clips, "frozen")[0].video_TYXC,
        spoil(clips, "reversed")[0].video_TYXC,
    )
    assert all(torch.equal(frame, clips[0].video_TYXC[0]) for frame in frozen)
    assert torch.equal(back[0], clips[0].video_TYXC[-1])
    assert torch.equal(back.flip(0), clips[0].video_TYXC)
    shuffled = spoil(clips, "shuffled pixels")
    for before, after in zip(clips, shuffled, strict=True):
        # the same places in every frame: sorted pixels are equal, and so is each pixel's course
        courses = before.video_TYXC.flatten(1, 2).transpose(0, 1).flatten(1)
        moved = after.video_TYXC.flatten(1, 2).transpose(0, 1).flatten(1)
        assert sorted(courses.tolist()) == sorted(moved.tolist())
        assert not torch.equal(courses, moved)
    noise = spoil(clips, "noise")
    assert float(noise[0].video_TYXC.float().std()) == pytest.approx(
        255 / 12**0.5, rel=0.05
    )
    assert not torch.equal(noise[0].video_TYXC, noise[1].video_TYXC)
    assert {clip.fps for clip in spoil(clips, "twice the rate")} == {2.0 * FPS}


def test_wrong_prompt_is_another_prompt_where_prompts_repeat() -> None:
    video = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    clips = [RewardClip(video, 8.0, prompt) for prompt in ("a", "a", "b", "a")]
    wrong = [clip.prompt for clip in spoil(clips, "wrong prompt")]
    assert wrong == ["b", "b", "a", "b"]


def result_of(case: str, below: int, same: int, above: int) -> SensitivityResult:
    return SensitivityResult(case, 1.0, 0.0, below, same, above, unscored=1)


@pytest.mark.parametrize(
    ("wrong", "shuffled", "disliked"),
    [
        ((5, 0, 3), (8, 0, 0), []),
        # as many rose as fell: too little to say so
        ((4, 0, 4), (8, 0, 0), []),
        ((3, 0, 5), (8, 0, 0), ["wrong prompt"]),
        ((8, 0, 0), (1, 5, 2), ["shuffled pixels"]),
        # no prompt is read
        ((0, 8, 0), (0, 0, 8), []),
    ],
)
def test_reward_is_not_sensible_where_more_videos_rise_than_fall(
    wrong: tuple[int, int, int], shuffled: tuple[int, int, int], disliked: list[str]
) -> None:
    results = [
        result_of("wrong prompt", *wrong),
        result_of("shuffled pixels", *shuffled),
        result_of("noise", 0, 0, 8),
    ]
    assert reward_check.not_sensible(results) == disliked
    assert reward_check.reads_prompt(results) == (wrong != (0, 8, 0))


def test_check_passes_oracle_and_fails_negated_oracle() -> None:
    verdicts = {one.case: one for one in check(ShapesOracle(), worlds())}
    assert list(verdicts) == list(CASES)
    for case in reward_check.MUST:
        assert verdicts[case].below > verdicts[case].above, case
        assert verdicts[case].below >= 5
    assert verdicts["twice the rate"].same == 6  # it counts frames

    class Opposite(ShapesOracle):
        def score(self, *of: object, **options: object) -> Score:
            return Score(-super().score(*of, **options).value_B)

    assert not any(
        one.below > one.above
        for one in check(Opposite(), worlds())
        if one.case in reward_check.MUST
    )


def test_clips_of_different_size_and_rate_are_scored() -> None:
    from alignment.rewards.brightness import Brightness

    clips = [
        RewardClip(torch.full((t, y, 16, 3), grey, dtype=torch.uint8), fps, prompt)
        for t, y, fps, grey, prompt in (
            (3, 16, 8.0, 51, "a"),
            (5, 32, 4.0, 102, "b"),
            (3, 16, 8.0, 204, "c"),
        )
    ]
    assert score_clips(Brightness(), clips).value_B.tolist() == pytest.approx(
        [0.2, 0.4, 0.8]
    )
    with pytest.raises(ValueError, match="two"):
        check(Brightness(), clips[:1])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    clips = worlds(4)
    for i, clip in enumerate(clips):
        write_mp4(tmp_path / f"{i}.mp4", clip.video_TYXC, clip.fps, crf=0)
    (tmp_path / "prompts.txt").write_text("".join(f"{clip.prompt}\n" for clip in clips))
    return ["--videos", f"{tmp_path}/*.mp4", "--prompts", str(tmp_path / "prompts.txt")]


def test_command_exits_1_for_a_reward_that_prefers_wrong_videos(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        check_rewards.main(
            [
                *files,
                "rewards.shapes.target=toy/oracle.py:ShapesOracle",
                "--out",
                str(tmp_path / "counts.json"),
            ]
        )
    assert done.value.code == 0
    said = capsys.readouterr().out
    counts = json.loads((tmp_path / "counts.json").read_text())["shapes"]
    assert list(counts) == list(CASES)
    wrong = counts["wrong prompt"]
    assert wrong["fell"] + wrong["same"] + wrong["rose"] == 4
    assert wrong["mean_spoilt"] < wrong["mean_right"]
    assert "shapes, 4 videos" in said
    assert all(case in said for case in CASES)
    assert "NOT SENSIBLE" not in said
    (tmp_path / "upside_down.py").write_text(
        "from toy.oracle import ShapesOracle\n"
        "def score(video, prompts, *, fps):\n"
        "    return -ShapesOracle().score(video, prompts, fps=fps).value_B\n"
    )
    with pytest.raises(SystemExit) as done:
        check_rewards.main(
            [*files, f"rewards.mine.target={tmp_path / 'upside_down.py'}:score"]
        )
    assert done.value.code == 1
    assert capsys.readouterr().out.count("NOT SENSIBLE") == 2
    with pytest.raises(SystemExit) as done:
        check_rewards.main(
            [
                *files,
                f"rewards.mine.target={tmp_path / 'upside_down.py'}:score",
                "--no-fail",
            ]
        )
    assert done.value.code == 0


def test_command_reports_a_reward_that_ignores_prompts(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        check_rewards.main([*files, "rewards.brightness.weight=1", "--limit", "2"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "does not read the prompt" in said
    assert "difference" in said
    assert "2 videos" in said


def test_command_exits_1_for_a_reward_that_scores_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mute.py").write_text(
        "def score(video, prompts):\n    return [None] * len(prompts)\n"
    )
    with pytest.raises(SystemExit) as done:
        check_rewards.main(
            [*files, f"rewards.mine.target={tmp_path / 'mute.py'}:score"]
        )
    assert done.value.code == 1
    assert "4 not scored" in capsys.readouterr().out
