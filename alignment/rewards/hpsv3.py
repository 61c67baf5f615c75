"""HPSv3 (2508.03789): how much people like a frame, by a Qwen2-VL-7B. It does not see motion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignment.rewards.frames import evenly_spaced, mean_of_best
from common.memory import AdaptiveBatcher
from common.types import Score
from rm.baselines.qwen2_vl import shared

if TYPE_CHECKING:
    from torch import Tensor


class HPSv3:
    """MEAN of HPSv3's mu over the best frames. Guard against policies that learn to stand still.

    checkpoint  The folder that ``launch/convert_reward.py hpsv3`` wrote.
    prompt      Score every frame under this text instead of the video's prompt: "A high-quality
                image" is LongCat-Video's HPSv3-general (2510.22200, section 3.3.2).
    best        The share of frames that count, those with the highest scores: 0.3 with the
                video's prompt is LongCat-Video's HPSv3-percentile.
    frames      The number of evenly spaced frames to score; null for all, as in the paper.
    batch       Frames per forward; halved for good when memory runs out.

    ``fps`` plays no part. Two such rewards with the same checkpoint share its weights.
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
                "hpsv3 needs best in (0, 1], frames and batch >= 1, "
                f"got {best}, {frames}, {batch}"
            )
        # loaded once for all rewards with this checkpoint
        self.reward_model = shared(str(checkpoint), device, dtype)
        self.prompt = prompt
        self.best = best
        self.frames = frames
        self.batcher = AdaptiveBatcher(batch, what="frames of the hpsv3 reward")

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        frames = evenly_spaced(video_BTYXC.shape[1], self.frames)
        values = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            # outputs are (frames, 2): mu and sigma
            output_N2 = self.reward_model.read_images(
                video_TYXC[frames], self.prompt or prompt, portions=self.batcher
            )
            values.append(mean_of_best(output_N2[:, 0], self.best))
        return Score(torch.stack(values))
