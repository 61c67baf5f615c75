"""Check that a reward orders videos sensibly: good videos against the same videos spoilt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.distributed import derive_seed
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel

CASES = {
    "wrong prompt": "each video with the next one's prompt",
    "noise": "random pixels instead of the video",
    "frozen": "its first frame all the time",
    "reversed": "its frames backwards",
    "twice the rate": "the same frames at twice the fps",
}
# Any reward that reads prompts and looks at videos gives these a lower score.
MUST = ("wrong prompt", "noise")


@dataclass(frozen=True)
class RewardClip:
    """A video (T, Y, X, 3) uint8 with its frame rate and its prompt."""

    video_TYXC: Tensor
    fps: float
    prompt: str


def score_clips(reward: RewardModel, clips: Sequence[RewardClip]) -> Score:
    """Score clips of any sizes and rates, in order: a call for each size and rate."""
    # the numbers of the clips of each size and rate
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, clip in enumerate(clips):
        alike.setdefault((tuple(clip.video_TYXC.shape), clip.fps), []).append(i)

    scores = []
    for (_, fps), places in alike.items():
        # a call of the reward takes videos of a common size and rate
        video_BTYXC = torch.stack([clips[i].video_TYXC for i in places])
        prompts = [clips[i].prompt for i in places]
        scores.append((places, reward.score(video_BTYXC, prompts, fps=fps)))
    return Score.placed(len(clips), scores)


@dataclass(frozen=True)
class SensitivityResult:
    """How a reward answers a case: MEAN scores, and how many spoilt videos scored below,
    the same as, or above the right ones.
    """

    case: str
    right: float
    spoilt: float
    below: int
    same: int
    above: int
    unjudged: int


def spoil(clips: Sequence[RewardClip], case: str) -> list[RewardClip]:
    """Spoil every clip by a case of `CASES`."""
    spoilt = []
    for i, clip in enumerate(clips):
        video = clip.video_TYXC
        fps = clip.fps
        prompt = clip.prompt
        if case == "wrong prompt":
            prompt = clips[(i + 1) % len(clips)].prompt
        elif case == "noise":
            source = torch.Generator().manual_seed(derive_seed(0, "reward check", i))
            video = torch.randint(
                0, 256, video.shape, generator=source, dtype=torch.uint8
            )
        elif case == "frozen":
            video = video[:1].expand_as(video).contiguous()
        elif case == "reversed":
            video = video.flip(0)
        else:
            fps = 2 * fps
        spoilt.append(RewardClip(video, fps, prompt))
    return spoilt


def check(reward: RewardModel, clips: Sequence[RewardClip]) -> list[SensitivityResult]:
    """Score the clips as they are and spoilt by every case.

    Raises ValueError for fewer than two different prompts, which leave no wrong prompt to try.
    """
    if len({clip.prompt for clip in clips}) < 2:
        raise ValueError("a check needs videos of at least two different prompts")
    # as they are, then spoilt in every way
    right_B = score_clips(reward, clips).value_B
    results = []
    for case in CASES:
        spoilt_B = score_clips(reward, spoil(clips, case)).value_B
        # a video counts when it has a score both times
        scored_B = right_B.isfinite() & spoilt_B.isfinite()
        right = right_B[scored_B]
        spoilt = spoilt_B[scored_B]
        result = SensitivityResult(
            case=case,
            right=mean_score(right),
            spoilt=mean_score(spoilt),
            below=int((spoilt < right).sum()),
            same=int((spoilt == right).sum()),
            above=int((spoilt > right).sum()),
            unjudged=int((~scored_B).sum()),
        )
        results.append(result)
    return results


def mean_score(value_B: Tensor) -> float:
    """MEAN of the finite scores. NaN when there are none."""
    scored = value_B[value_B.isfinite()]
    return float(scored.mean()) if scored.numel() else math.nan
