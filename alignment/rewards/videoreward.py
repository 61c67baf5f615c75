"""VideoReward (2501.13918): visual quality, motion quality, text alignment, by a Qwen2-VL-2B at two frames a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from common.log import say
from common.types import Score
from rm.baselines.qwen2_vl import frame_indices, shared

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class VideoReward:
    """One of the three, or their sum; every one is (x - mean) / std with the checkpoint's own numbers.

    checkpoint  folder that ``launch/convert_reward.py videoreward`` wrote
    dimension   "VQ", "MQ", "TA", or "overall", their sum
    gray        judge the video without its colours: motion quality is then harder to please by pretty pictures
                (LongCat-Video 2510.22200, figure 20, with weights of its own)

    ``fps`` is the video's true rate. The model learnt from 2 frames a second of clips of some seconds: from a clip of
    less than 2 s it gets 4 frames all the same, in another tempo. That is said once. Videos are judged one by one.
    """

    name = "videoreward"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dimension: Literal["overall", "VQ", "MQ", "TA"] = "overall",
        gray: bool = False,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self.judge = shared(str(checkpoint), device, dtype)
        self.outputs = self.judge.layout.outputs
        if dimension not in ("overall", *self.outputs):
            raise ValueError(
                f"videoreward knows overall, {', '.join(self.outputs)}, not {dimension!r}"
            )
        self.dimension, self.gray, self._told = dimension, gray, False

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        self._tell_of_another_tempo(video_BTYXC.shape[1], fps)
        if self.gray:
            video_BTYXC = to_gray(video_BTYXC)
        found_BK = torch.stack(
            [
                self.judge.read_video(video, prompt, fps=fps)
                for video, prompt in zip(video_BTYXC, prompts, strict=True)
            ]
        )
        parts = dict(zip(self.outputs, found_BK.unbind(dim=1), strict=True))
        return Score(
            found_BK.sum(dim=1)
            if self.dimension == "overall"
            else parts[self.dimension],
            parts,
        )

    def _tell_of_another_tempo(self, count: int, fps: float) -> None:
        settings = self.judge.layout.settings
        if self._told or count < 2:
            return
        seen = frame_indices(count, fps, settings)
        if (rate := (len(seen) - 1) * fps / max(1, count - 1)) > 1.5 * settings.fps:
            self._told = True
            say(
                f"videoreward: of {count} frames at {fps:g} fps ({count / fps:.1f} s) it sees {len(seen)}, {rate:.1f} "
                f"a second, but learnt from {settings.fps:g}. If the rate is right, the clips are short for this judge"
            )


def to_gray(video_BTYXC: Tensor) -> Tensor:
    """uint8 -> uint8, all three channels the luma."""
    luma_BTYX1 = (video_BTYXC.float() * torch.tensor(LUMA)).sum(dim=-1, keepdim=True)
    return (
        luma_BTYX1.round()
        .clamp(0, 255)
        .to(torch.uint8)
        .expand(video_BTYXC.shape)
        .contiguous()
    )
