"""VideoReward (2501.13918): visual quality, motion quality and text alignment by a Qwen2-VL-2B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from common.log import say
from common.types import Score
from rm.baselines.qwen2_vl import frame_indices_qwen_utils, shared

if TYPE_CHECKING:
    from torch import Tensor

# Luma of ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)


class VideoReward:
    """A dimension of VideoReward or the sum of all, each (x - mean) / std by the checkpoint.

    checkpoint  The folder that ``launch/convert_reward.py videoreward`` wrote.
    dimension   "VQ", "MQ", "TA", or "overall", their sum.
    gray        Score the video without its colours: pretty pictures then raise motion quality
                less (LongCat-Video 2510.22200, figure 20, with its retrained weights).

    ``fps`` is the video's true rate. The model was trained on clips of some seconds at 2 frames
    a second. It sees 4 frames of a clip below 2 s too, in another tempo, which is reported
    once. Videos are scored in a forward each.
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
        self.reward_model = shared(str(checkpoint), device, dtype)
        self.outputs = self.reward_model.layout.outputs
        if dimension not in ("overall", *self.outputs):
            raise ValueError(
                f"videoreward knows overall, {', '.join(self.outputs)}, not {dimension!r}"
            )
        self.dimension = dimension
        self.gray = gray
        self._reported_tempo = False

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        self._report_tempo(video_BTYXC.shape[1], fps)
        if self.gray:
            video_BTYXC = to_gray(video_BTYXC)
        rows = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            # (VQ, MQ, TA) of a video
            rows.append(self.reward_model.read_video(video_TYXC, prompt, fps=fps))
        value_BK = torch.stack(rows)
        parts = dict(zip(self.outputs, value_BK.unbind(dim=1), strict=True))
        # a dimension, or their sum
        if self.dimension == "overall":
            return Score(value_BK.sum(dim=1), parts)
        return Score(parts[self.dimension], parts)

    def _report_tempo(self, count: int, fps: float) -> None:
        """Report, once, clips that are so short that the model sees another tempo."""
        if self._reported_tempo or count < 2:
            return
        settings = self.reward_model.layout.settings
        # the rate at which the model sees the frames
        seen = len(frame_indices_qwen_utils(count, fps, settings))
        rate = (seen - 1) * fps / max(1, count - 1)
        if rate > 1.5 * settings.fps:
            self._reported_tempo = True
            say(
                f"videoreward: of {count} frames at {fps:g} fps ({count / fps:.1f} s) it sees "
                f"{seen}, {rate:.1f} a second, but was trained on {settings.fps:g}. "
                "If the rate is right, the clips are short for this reward model"
            )


def to_gray(video_BTYXC: Tensor) -> Tensor:
    """Set all three channels to the luma, uint8 -> uint8."""
    luma_BTYX1 = (video_BTYXC.float() * torch.tensor(LUMA)).sum(dim=-1, keepdim=True)
    gray_BTYX1 = luma_BTYX1.round().clamp(0, 255).to(torch.uint8)
    return gray_BTYX1.expand(video_BTYXC.shape).contiguous()
