"""HPSv3 (2508.03789): how much people like a frame, by a Qwen2-VL-7B. It sees no motion: guard against stills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.memory import AdaptiveBatcher
from common.types import Score
from rm.baselines.qwen2_vl import shared

if TYPE_CHECKING:
    from torch import Tensor


class HPSv3:
    """MEAN of mu over the best frames.

    checkpoint  folder that ``launch/convert_reward.py hpsv3`` wrote
    prompt      judge every frame under this text instead of the video's prompt: "A high-quality image" is
                LongCat-Video's HPSv3-general (2510.22200, section 3.3.2)
    best        share of the frames that count, those that score highest: 0.3 with the video's own prompt is its
                HPSv3-percentile
    frames      that are looked at, evenly spaced, first and last included; null for all, which is the paper's
    batch       frames at once; halved for good when memory runs out

    ``fps`` plays no part. Two such rewards with one checkpoint share its weights.
    """

    name = "hpsv3"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        prompt: str | None = None,
        best: float = 1.0,
        frames: int | None = None,
        batch: int = 16,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if not 0 < best <= 1 or batch < 1 or (frames is not None and frames < 1):
            raise ValueError(
                f"hpsv3 needs best in (0, 1], frames and batch >= 1, got {best}, {frames}, {batch}"
            )
        self.judge = shared(str(checkpoint), device, dtype)
        self.prompt, self.best, self.frames = prompt, best, frames
        self.portions = AdaptiveBatcher(batch, what="frames before the judge")

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        count = (
            video_BTYXC.shape[1]
            if self.frames is None
            else min(self.frames, video_BTYXC.shape[1])
        )
        chosen = torch.linspace(0, video_BTYXC.shape[1] - 1, count).round().long()
        kept = max(1, math.ceil(self.best * count - 1e-9))
        values = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            found_NK = self.judge.read_images(
                video_TYXC[chosen], self.prompt or prompt, portions=self.portions
            )
            values.append(found_NK[:, 0].topk(kept).values.mean())
        return Score(torch.stack(values))
