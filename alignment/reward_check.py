"""Check that a reward orders videos sensibly: good videos against the same videos spoilt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.rewards.errors import contained_score
from common.distributed import seeded_generator
from common.types import Score, json_number

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel

CASES = {
    "wrong prompt": "each video with the prompt of another",
    "shuffled pixels": "its pixels at other places, the same places in every frame",
    "noise": "random pixels instead of the video",
    "frozen": "its first frame all the time",
    "reversed": "its frames backwards",
    "twice the rate": "the same frames at twice the fps",
}
# Any reward that reads prompts and looks at videos gives most of these a lower score.
MUST = ("wrong prompt", "shuffled pixels")
# Far from whatever a reward model was trained on: its scores there are arbitrary.
UNFAMILIAR = ("noise",)


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
        scores.append((places, contained_score(reward, video_BTYXC, prompts, fps=fps)))
    return Score.placed(len(clips), scores)


@dataclass(frozen=True)
class SensitivityResult:
    """How a reward answers a case: MEAN scores, and how many spoilt videos scored below,
    the same as, or above the right ones. A video without a score is ``unscored`` only.
    """

    case: str
    right: float
    spoilt: float
    below: int
    same: int
    above: int
    unscored: int

    @property
    def scored(self) -> int:
        """The number of videos with a score both times."""
        return self.below + self.same + self.above

    @property
    def rises(self) -> bool:
        """True if more videos gained by the corruption than lost."""
        return self.above > self.below

    @property
    def changes_nothing(self) -> bool:
        """True if every scored video has the same score both times, to the bit."""
        return self.scored > 0 and self.same == self.scored

    def as_dict(self) -> dict[str, float | None]:
        """Counts and means for JSON; a mean is None where no video has a score."""
        return {
            "fell": self.below,
            "same": self.same,
            "rose": self.above,
            "unscored": self.unscored,
            "mean_right": json_number(self.right),
            "mean_spoilt": json_number(self.spoilt),
        }

    @property
    def description(self) -> str:
        """The counts and means as a part of a sentence."""
        text = f"fell {self.below} of {self.scored}"
        for count, word in ((self.same, "same"), (self.above, "rose")):
            if count:
                text += f", {word} {count}"
        if self.unscored:
            text += f", {self.unscored} not scored"
        return f"{text}, mean {self.right:.3f} to {self.spoilt:.3f}"


def spoil(clips: Sequence[RewardClip], case: str) -> list[RewardClip]:
    """Spoil every clip by a case of `CASES`."""
    spoilt = []
    for i, clip in enumerate(clips):
        video = clip.video_TYXC
        fps = clip.fps
        prompt = clip.prompt
        if case == "wrong prompt":
            prompt = _next_prompt(clips, i)
        elif case == "shuffled pixels":
            frames, height, width, channels = video.shape
            order = torch.randperm(height * width, generator=_source(i))
            pixels = video.reshape(frames, height * width, channels)
            video = pixels[:, order].reshape(video.shape)
        elif case == "noise":
            video = torch.randint(
                0, 256, video.shape, generator=_source(i), dtype=torch.uint8
            )
        elif case == "frozen":
            video = video[:1].expand_as(video).contiguous()
        elif case == "reversed":
            video = video.flip(0)
        else:
            fps = 2 * fps
        spoilt.append(RewardClip(video, fps, prompt))
    return spoilt


def _source(i: int) -> torch.Generator:
    """The randomness of a case for clip number i."""
    return seeded_generator(0, "reward check", i)


def _next_prompt(clips: Sequence[RewardClip], i: int) -> str:
    """The next prompt after clip i that differs from its own; its own if there is none."""
    following = [*clips[i + 1 :], *clips[:i]]
    others = (clip.prompt for clip in following if clip.prompt != clips[i].prompt)
    return next(others, clips[i].prompt)


def check(
    reward: RewardModel,
    clips: Sequence[RewardClip],
    cases: Sequence[str] = tuple(CASES),
) -> list[SensitivityResult]:
    """Score the clips as they are and spoilt by each of some cases, by default all.

    Raises ValueError for fewer than two different prompts, which leave no wrong prompt to try.
    """
    if len({clip.prompt for clip in clips}) < 2:
        raise ValueError("a check needs videos of at least two different prompts")
    # as they are, then spoilt in each way
    right_B = score_clips(reward, clips).value_B
    results = []
    for case in cases:
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
            unscored=int((~scored_B).sum()),
        )
        results.append(result)
    return results


def reads_prompt(results: Sequence[SensitivityResult]) -> bool:
    """False when wrong prompts change no bit of any score, as of a brightness."""
    (wrong,) = [result for result in results if result.case == "wrong prompt"]
    return not wrong.changes_nothing


def not_sensible(results: Sequence[SensitivityResult]) -> list[str]:
    """The cases that a reward should not like but does.

    Empty for a reward that does not read the prompt: it measures something else than how well a
    video shows its prompt, and nobody but its author knows what should score high.
    """
    if not reads_prompt(results):
        return []
    return [result.case for result in results if result.case in MUST and result.rises]


def mean_score(value_B: Tensor) -> float:
    """MEAN of the finite scores. NaN when there are none."""
    scored = value_B[value_B.isfinite()]
    return float(scored.mean()) if scored.numel() else math.nan
