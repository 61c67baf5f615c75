"""Signals of motion on videos whose motion is known."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from alignment.rewards.motion import Dynamics, Smoothness


def sliding(step: int, frames: int = 6, side: int = 64) -> torch.Tensor:
    """A smooth random texture that moves ``step`` pixels to the right every frame."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, side // 8, side // 8, generator=draw)
    texture = torch.nn.functional.interpolate(
        coarse, size=(side, side), mode="bicubic"
    ).clamp(0, 1)[0]
    moved = [texture.roll(step * t, dims=2) for t in range(frames)]
    return (
        (torch.stack(moved) * 255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
    )


def test_dynamics_is_speed_in_diagonals_per_second() -> None:
    video = torch.stack([sliding(0), sliding(1), sliding(2)])
    found = Dynamics().score(video, ["a"] * 3, fps=8.0).value_B
    diagonal = math.hypot(64, 64)
    assert float(found[0]) == pytest.approx(0.0, abs=1e-3)
    assert float(found[1]) == pytest.approx(8 * 1 / diagonal, rel=0.15)
    assert float(found[2]) == pytest.approx(8 * 2 / diagonal, rel=0.15)
    again = Dynamics().score(video, ["a"] * 3, fps=16.0).value_B
    torch.testing.assert_close(again, 2 * found)


def test_smoothness_by_hand() -> None:
    """Grey 0, 51, 0 bends by 2 * 0.2; a steady rise and a still video bend by nothing."""
    grey = torch.tensor([[0, 51, 0], [0, 51, 102], [9, 9, 9]], dtype=torch.uint8)
    video = grey[:, :, None, None, None].expand(-1, -1, 16, 16, 3).contiguous()
    found = Smoothness().score(video, ["a"] * 3, fps=8.0).value_B
    assert found.tolist() == pytest.approx([-0.4, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("kind", "frames"), [("dynamics", 1), ("smoothness", 2)])
def test_motion_of_too_few_frames_is_nan(kind: str, frames: int) -> None:
    (reward,) = build_rewards({kind: RewardConfig()}).values()
    assert reward.score(sliding(1)[None, :frames], ["a"], fps=8.0).value_B.isnan().all()


@pytest.mark.parametrize("kind", ["dynamics", "smoothness"])
def test_motion_scores_follow_a_permuted_batch(kind: str) -> None:
    (reward,) = build_rewards({kind: RewardConfig()}).values()
    video, order = torch.stack([sliding(i) for i in range(4)]), [2, 0, 3, 1]
    plain = reward.score(video, ["a"] * 4, fps=8.0).value_B
    assert torch.equal(
        reward.score(video[order], ["a"] * 4, fps=8.0).value_B, plain[order]
    )
    assert reward.name == kind


def test_motion_of_tiny_frames_raises() -> None:
    with pytest.raises(ValueError, match=r"\b16\b"):
        Dynamics().score(torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8), ["a"], fps=8.0)
