"""The exact oracle of the embedded world as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

        totals = [result.total for result in results]
        scores = [result.scores for result in results]
        return to_score(totals, scores, SUB_DIMENSIONS)


def to_score(
    values: Sequence[float],
    parts: Sequence[Mapping[str, float]],
    names: Sequence[str],
) -> Score:
    """Collect the values of videos, and the parts of these names, one tensor (B,) for each."""
    tensors = {}
    for name in names:
        column = [float(of_video[name]) for of_video in parts]
        tensors[name] = torch.tensor(column)
    return Score(value_B=torch.tensor(values), parts=tensors)
