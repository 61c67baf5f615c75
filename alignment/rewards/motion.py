"""How much and how steadily a video moves: signals without weights, to watch for static or flickering videos.

A policy may raise a reward by standing still (HPSv3 alone does that) or by flickering; with weight 0 these show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

FASTEST = 0.05  # share of the pixels that count, as in VBench's dynamic degree


class Smoothness:
    """- MEAN |x_{t+1} - 2 x_t + x_{t-1}| / 255 over pixels and inner frames: 0 for a still video, lower for a flicker.

    Needs three frames; a shorter video is NaN. ``fps`` plays no part: what counts is what a frame does not tell of the
    next.
    """

    name = "smoothness"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        if video_BTYXC.shape[1] < 3:
            return Score(torch.full((len(prompts),), math.nan))
        x = video_BTYXC.float() / 255
        bend = (x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]).abs()
        return Score(-bend.flatten(1).mean(dim=1))


class Dynamics:
    """How fast the fastest twentieth of the pixels moves, in frame diagonals a second; MEAN over pairs of frames.

    By dense optical flow (OpenCV's DIS, Kroeger et al. 2016). ``fps`` matters: the same frames at twice the rate move
    twice as fast. Needs two frames; a shorter video is NaN. Frames below 16 pixels are refused with ValueError.
    """

    name = "dynamics"

    def __init__(self) -> None:
        import cv2

        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.grey = lambda frame_YXC: cv2.cvtColor(frame_YXC, cv2.COLOR_RGB2GRAY)

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        height, width = video_BTYXC.shape[2:4]
        if min(height, width) < 16:
            raise ValueError(
                f"dynamics needs frames of at least 16 pixels, got {height} x {width}"
            )
        speeds = [self._speed(video_TYXC) for video_TYXC in video_BTYXC]
        return Score(
            torch.tensor(speeds, dtype=torch.float32) * fps / math.hypot(height, width)
        )

    def _speed(self, video_TYXC: Tensor) -> float:
        """Pixels a frame."""
        frames = [self.grey(frame_YXC) for frame_YXC in video_TYXC.cpu().numpy()]
        if len(frames) < 2:
            return math.nan
        found = []
        for one, two in pairwise(frames):
            speed = (
                torch.from_numpy(self.flow.calc(one, two, None)).norm(dim=2).flatten()
            )
            found.append(
                float(speed.topk(max(1, int(FASTEST * len(speed)))).values.mean())
            )
        return sum(found) / len(found)
