"""The exact oracle of the embedded world as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.types import Score
from toy.measure import measure
from toy.world import SUB_DIMENSIONS


class ShapesOracle:
    """`toy.measure.measure` as a reward: totals in [0, 1], sub-dimensions (0, 1 or 2) as parts.

    Raises ValueError for a video or a prompt that is not of this world.
    """

    name = "shapes"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        results = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            results.append(measure(video_TYXC, prompt))

        # One tensor of all videos for each sub-dimension.
        parts = {}
        for name in SUB_DIMENSIONS:
            values = [float(result.scores[name]) for result in results]
            parts[name] = torch.tensor(values)
        totals = torch.tensor([result.total for result in results])
        return Score(value_B=totals, parts=parts)
