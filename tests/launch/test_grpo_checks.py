"""How many videos the self-checks of rewards take, and what they tell about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.rewards.errors import NamedReward
from common.config import load
from common.run_record import SETTINGS, write_settings
from common.types import Score
from launch.schemas.training import GrpoRun
from launch.training import grpo_checks
from launch.training.grpo_checks import changed_rewards

PROMPTS = [f"prompt {i}" for i in range(20)]


class CountingGenerator:
    """Makes a video of a constant, and counts how many."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        self.prompts += prompts
        return torch.zeros(1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        video = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)
        return video + len(self.prompts)


@pytest.mark.parametrize(("seconds", "videos"), [(-1.0, 4), (1e6, 16)])
def test_videos_to_check_are_more_when_sampling_is_quick(
    monkeypatch: pytest.MonkeyPatch, seconds: float, videos: int
) -> None:
    monkeypatch.setattr(grpo_checks, "CHECK_SECONDS", seconds)
    generator = CountingGenerator()
    loop = SimpleNamespace(
        generator=generator,
        decode_to_score=generator.decode,
        has_scoring_decoder=False,
    )
    found = grpo_checks.sample_to_check(SimpleNamespace(seed=0), loop, PROMPTS[:16])
    assert len(found) == videos
    assert generator.prompts == PROMPTS[:videos]


def test_groups_of_the_run_are_decoded_for_rewards_and_by_the_vae() -> None:
    """The first two prompts of a step, whole groups; levels are those of the latents."""
    batch = SimpleNamespace(prompts=["a", "b", "c"], seeds=[10, 20, 30])

    def rollout(
        prompts: Sequence[str], *, group_size: int, seeds: Sequence[int]
    ) -> list[SimpleNamespace]:
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            clean = seed + torch.arange(group_size).view(-1, 1, 1, 1, 1)
            groups.append(
                SimpleNamespace(prompt=prompt, clean_GCFHW=clean, size=group_size)
            )
        return groups

    loop = SimpleNamespace(
        batch=lambda step: batch,
        ranks=SimpleNamespace(members=2),
        generator=SimpleNamespace(rollout=rollout, decode=lambda clean: clean),
        decode_to_score=lambda clean: clean + 100,
    )
    small, whole, texts = grpo_checks.decoded_both_ways(loop)
    assert whole.flatten().tolist() == [10, 11, 20, 21]
    assert small.flatten().tolist() == [110, 111, 120, 121]
    assert texts == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("seconds_each", "videos"),
    [(0.0, 16), (0.625, 16), (1.0, 10), (2.5, 4), (400.0, 4)],
)
def test_checks_score_as_many_videos_as_ten_seconds_allow(
    seconds_each: float, videos: int
) -> None:
    assert grpo_checks.affordable_videos(seconds_each) == videos


def test_equal_prompts_leave_the_rewards_unchecked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one prompt there is no wrong one; of two there is, however often they are repeated."""
    checked: list[list[str]] = []

    def record(run: object, loop: object, prompts: list[str]) -> list[object]:
        checked.append(prompts)
        return []

    monkeypatch.setattr(grpo_checks, "_generator_findings", lambda *of: [])
    monkeypatch.setattr(grpo_checks, "_reward_findings", record)
    grpo_checks.run_self_checks(None, None, ["a", "a", "a"])
    assert checked == []
    assert "self-checks: sampling" in capsys.readouterr().out
    grpo_checks.run_self_checks(None, None, ["a", "a", "b"])
    assert checked == [["a", "b"]]
    assert "self-checks: scoring" in capsys.readouterr().out


class PromptFree:
    """The mean of the first frame, whatever the prompt."""

    name = "kind"

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return Score(video_BTYXC[:, 0].float().mean((1, 2, 3)))


def test_reward_that_ignores_prompts_is_said_and_is_no_warning() -> None:
    video_BTYXC = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1, 1)
    video_BTYXC = video_BTYXC.expand(16, 2, 4, 4, 3).contiguous()
    reward = NamedReward("mine", PromptFree())
    order, sense = grpo_checks._findings_of(reward, video_BTYXC, PROMPTS[:16], fps=8.0)
    assert (order.ok, sense.ok) == (True, True)
    assert sense.name == "sense, mine"
    assert "does not read the prompt" in sense.fact
    # as many videos as there are, since these scores are quick
    assert "fell 0 of 16, same 16" in sense.fact


def test_changed_reward_is_checked_again_and_a_weight_is_not(tmp_path: Path) -> None:
    words = ["rewards.oracle.weight=0.5"]
    recipe = "configs/shapes/grpo_oracle.yaml"
    write_settings(load(GrpoRun, recipe), tmp_path / SETTINGS)
    same = load(GrpoRun, recipe, [*words, "optimizer.lr=1"])
    assert changed_rewards(tmp_path, same) == []
    other = load(GrpoRun, recipe, ["rewards.oracle.target=examples/my_reward.py:score"])
    (change,) = changed_rewards(tmp_path, other)
    assert change.startswith("rewards.oracle.target: ")
    # a reward that joins
    more = load(GrpoRun, recipe, ["rewards.warm.target=examples/my_reward.py:score"])
    assert any("warm" in change for change in changed_rewards(tmp_path, more))
    # a checkpoint of an earlier version
    assert changed_rewards(tmp_path / "none", other) == []
