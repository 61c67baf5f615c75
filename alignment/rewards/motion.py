"""How much and how steadily a video moves: rewards without weights.

A policy may raise a reward by standing still (HPSv3 alone invites that) or by flickering. With
weight 0 these rewards show it.
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

# The share of pixels that count, as in VBench's dynamic degree.
FASTEST = 0.05


class Smoothness:
    """- MEAN |x_{t+1} - 2 x_t + x_{t-1}| / 255 over pixels and inner frames.

    It is 0 for a still video and lower for a flickering one: it measures what a frame does not
    tell about the next. Videos of fewer than three frames are NaN. ``fps`` plays no part.
    """

    name = "smoothness"

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        if video_BTYXC.shape[1] < 3:
            return Score(torch.full((len(prompts),), math.nan))
        # second difference in time: 0 where motion is even
        x = video_BTYXC.float() / 255
        after = x[:, 2:]
        inner = x[:, 1:-1]
        before = x[:, :-2]
        bend = (after - 2 * inner + before).abs()
        return Score(-bend.flatten(1).mean(dim=1))


class Dynamics:
    """Speed of the fastest twentieth of the pixels, in frame diagonals a second.

    MEAN over pairs of successive frames, by dense optical flow (OpenCV's DIS, Kroeger et al.
    2016). ``fps`` matters: the same frames at twice the rate move twice as fast. Videos of
    fewer than two frames are NaN. Raises ValueError for frames below 16 pixels.
    """

    name = "dynamics"

    def __init__(self) -> None:
        import cv2

        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.grey = lambda frame_YXC: cv2.cvtColor(frame_YXC, cv2.COLOR_RGB2GRAY)

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        height, width = video_BTYXC.shape[2:4]
        if min(height, width) < 16:
            raise ValueError(
                f"dynamics needs frames of at least 16 pixels, got {height} x {width}"
            )
        # each video separately
        speeds = [self._speed(video_TYXC) for video_TYXC in video_BTYXC]
        # pixels a frame -> diagonals a second
        diagonal = math.hypot(height, width)
        speed_B = torch.tensor(speeds, dtype=torch.float32)
        return Score(speed_B * fps / diagonal)

    def _speed(self, video_TYXC: Tensor) -> float:
        """The speed in pixels a frame."""
        frames = [self.grey(frame_YXC) for frame_YXC in video_TYXC.cpu().numpy()]
        if len(frames) < 2:
            return math.nan
        speeds = []
        for before, after in pairwise(frames):
            # optical flow, in pixels a frame
            flow_YX2 = torch.from_numpy(self.flow.calc(before, after, None))
            speed = flow_YX2.norm(dim=2).flatten()
            count = max(1, int(FASTEST * len(speed)))
            speeds.append(float(speed.topk(count).values.mean()))
        return sum(speeds) / len(speeds)
