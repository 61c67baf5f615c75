"""Select evenly spaced frames of a video, and average the best of their scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def evenly_spaced(length: int, count: int | None) -> Tensor:
    """Return the numbers of ``count`` evenly spaced frames, first and last included.

    A video of fewer frames, or a count of None, gives every frame.
    """
    count = length if count is None else min(count, length)
    return torch.linspace(0, length - 1, count).round().long()


def mean_of_best(value_K: Tensor, share: float) -> Tensor:
    """MEAN over the highest ``share`` of the last dimension, at least one value."""
    # 1e-9: 0.3 x 10 is a little above 3 in floating point
    count = max(1, math.ceil(share * value_K.shape[-1] - 1e-9))
    return value_K.topk(count, dim=-1).values.mean(dim=-1)
