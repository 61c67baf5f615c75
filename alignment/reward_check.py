"""Does a reward order videos sensibly? The same few, right and spoilt in ways whose effect people agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.clips import RewardClip, score_clips
from common.distributed import derive_seed

if TYPE_CHECKING:
    from common.types import RewardModel

CASES = {
    "wrong prompt": "each video with the next one's prompt",
    "noise": "random pixels instead of the video",
    "frozen": "its first frame all the time",
    "reversed": "its frames backwards",
    "twice the rate": "the same frames at twice the fps",
}
MUST = (
    "wrong prompt",
    "noise",
)  # below the right one for any reward that reads prompts and looks at videos


@dataclass(frozen=True)
class SensitivityResult:
    """One reward on one case: MEAN scores, and of how many videos the spoilt one scored below, like or above."""

    case: str
    right: float
    spoilt: float
    below: int
    same: int
    above: int
    unjudged: int

    @property
    def sensible(self) -> bool:
        """More videos fell than rose."""
        return self.below > self.above


def spoil(clips: Sequence[RewardClip], case: str, *, seed: int = 0) -> list[RewardClip]:
    """The clips of a case of `CASES`, one for each."""
    if case == "wrong prompt":
        prompts = [clip.prompt for clip in clips]
        return [
            RewardClip(c.video_TYXC, c.fps, prompt)
            for c, prompt in zip(clips, prompts[1:] + prompts[:1], strict=True)
        ]
    if case == "twice the rate":
        return [
            RewardClip(clip.video_TYXC, 2 * clip.fps, clip.prompt) for clip in clips
        ]
    spoilt = []
    for i, clip in enumerate(clips):
        video = clip.video_TYXC
        if case == "noise":
            draw = torch.Generator().manual_seed(derive_seed(seed, "reward check", i))
            video = torch.randint(
                0, 256, video.shape, generator=draw, dtype=torch.uint8
            )
        else:
            video = (
                video[:1].expand_as(video).contiguous()
                if case == "frozen"
                else video.flip(0)
            )
        spoilt.append(RewardClip(video, clip.fps, clip.prompt))
    return spoilt


def check(
    reward: RewardModel, clips: Sequence[RewardClip], *, seed: int = 0
) -> list[SensitivityResult]:
    """Every case. Raises ValueError for fewer than two clips or prompts, which leaves no wrong prompt to try."""
    if len({clip.prompt for clip in clips}) < 2:
        raise ValueError("a check needs videos of at least two different prompts")
    right_B = score_clips(reward, clips).value_B
    verdicts = []
    for case in CASES:
        spoilt_B = score_clips(reward, spoil(clips, case, seed=seed)).value_B
        judged = right_B.isfinite() & spoilt_B.isfinite()
        right, spoilt = right_B[judged], spoilt_B[judged]
        verdicts.append(
            SensitivityResult(
                case,
                float(right.mean()) if len(right) else math.nan,
                float(spoilt.mean()) if len(spoilt) else math.nan,
                int((spoilt < right).sum()),
                int((spoilt == right).sum()),
                int((spoilt > right).sum()),
                int((~judged).sum()),
            )
        )
    return verdicts
