"""The embedded world's exact oracle as a reward: the truth that a learned reward is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from common.types import Score
from toy.world import SUB_DIMENSIONS, measure

if TYPE_CHECKING:
    from torch import Tensor


class ShapesOracle:
    """`toy.world.measure`: the total in [0, 1], its sub-dimensions (0, 1 or 2) as parts. Raises as it does."""

    name = "shapes"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        verdicts = [
            measure(video_TYXC, prompt)
            for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True)
        ]
        parts = {
            key: torch.tensor([float(v.scores[key]) for v in verdicts])
            for key in SUB_DIMENSIONS
        }
        return Score(
            value_B=torch.tensor([float(v.total) for v in verdicts]), parts=parts
        )
