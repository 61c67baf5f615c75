"""Videos of any sizes and rates before one reward: those that are alike go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel


@dataclass(frozen=True)
class RewardClip:
    """A video (T, Y, X, 3) uint8 with its rate and its prompt."""

    video_TYXC: Tensor
    fps: float
    prompt: str


def score_clips(reward: RewardModel, clips: Sequence[RewardClip]) -> Score:
    """What the reward says of them, in order. One call for each size and rate."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, clip in enumerate(clips):
        kinds.setdefault((tuple(clip.video_TYXC.shape), clip.fps), []).append(i)
    found = []
    for (_, fps), places in kinds.items():
        video_BTYXC = torch.stack([clips[i].video_TYXC for i in places])
        found.append(
            (
                places,
                reward.score(video_BTYXC, [clips[i].prompt for i in places], fps=fps),
            )
        )
    return Score.placed(len(clips), found)
