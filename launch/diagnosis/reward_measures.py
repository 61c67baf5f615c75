"""Measure what reaches the rewards of a step, and what became of it on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult
    from alignment.rewards.errors import NamedReward
    from common.types import RewardModel


@dataclass
class RewardRecorder:
    """A reward that notes what it is given; its scores are those of the reward inside."""

    reward: RewardModel
    fps: list[float] = field(default_factory=list)
    prompt_of: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    largest: float = 0.0
    # Of the step before: its videos, its scores, and the scores of some alone.
    videos_before: set[str] = field(default_factory=set)
    value_before_B: Tensor | None = None
    alone_before_B: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        self.fps.append(float(fps))
        self.shape = tuple(video_BTYXC.shape[1:])
        self.largest = max(self.largest, float(video_BTYXC.max()))
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=False):
            self.prompt_of[fingerprint(video_TYXC)] = prompt
        return self.reward.score(video_BTYXC, prompts, fps=fps)

    def forget(self) -> None:
        """Start a new step."""
        self.fps.clear()
        self.prompt_of.clear()
        self.largest = 0.0


def fingerprint(video_TYXC: Tensor) -> str:
    """Identify a video by some of its pixels."""
    # At full size a part of the pixels is enough.
    _, height, width, _ = video_TYXC.shape
    rows = max(1, height // 64)
    columns = max(1, width // 64)
    part = video_TYXC[:, ::rows, ::columns].contiguous()
    return hashlib.sha256(part.cpu().numpy().tobytes()).hexdigest()


def record(rewards: Mapping[str, NamedReward]) -> dict[str, RewardRecorder]:
    """Put a recorder into every reward; `release` takes them out."""
    recorders = {}
    for name, named in rewards.items():
        recorders[name] = RewardRecorder(named.reward)
        named.reward = recorders[name]
    return recorders


def release(rewards: Mapping[str, NamedReward]) -> None:
    """Take the recorders out again."""
    for named in rewards.values():
        if isinstance(named.reward, RewardRecorder):
            named.reward = named.reward.reward


def received(
    recorder: RewardRecorder,
    result: StepResult,
    *,
    fps: float,
) -> dict[str, float]:
    """Compare what a reward got in a step with the step's own videos and prompts."""
    # The videos that were kept, group by group.
    if result.video_BTYXC is None:
        return {}
    members = result.advantage_PM.shape[1]

    # A cache may answer instead of it.
    if not recorder.prompt_of:
        return {"asked": 0.0}
    # Which prompt did the reward get with each of them?
    wrong = 0
    changed = 0
    lost = []
    for b, video_TYXC in enumerate(result.video_BTYXC):
        prompt = recorder.prompt_of.get(fingerprint(video_TYXC))
        if prompt is None:
            lost.append(video_TYXC)
        elif prompt not in result.batch.prompts:
            changed += 1
        elif prompt != result.batch.prompts[b // members]:
            wrong += 1
    count = len(result.video_BTYXC)
    found = {
        "asked": 1.0,
        "wrong_prompt": wrong / count,
        "changed_prompt": changed / count,
        "other_video": len(lost) / count,
    }
    if lost:
        found |= _mistake_of(recorder, lost[0])
    recorder.videos_before = {fingerprint(video) for video in result.video_BTYXC}
    # And which frame rate?
    if recorder.fps:
        found["fps_ratio"] = recorder.fps[-1] / fps
    return found


def _mistake_of(recorder: RewardRecorder, video_TYXC: Tensor) -> dict[str, float]:
    """What was done to a video that did not reach the reward as it is: 1 by its name."""
    # Found by making the mistakes on purpose.
    found = {}
    for name, changed in pixel_mistakes(video_TYXC[None]).items():
        if fingerprint(changed[0]) in recorder.prompt_of:
            found[f"other/{name}"] = 1.0
    if recorder.videos_before & set(recorder.prompt_of):
        found["other/before"] = 1.0
    # Or by its range and size.
    if recorder.largest <= 1 < float(video_TYXC.max()):
        found["other/unit"] = 1.0
    elif recorder.shape and recorder.shape[0] != video_TYXC.shape[0]:
        found["other/frames"] = 1.0
    elif recorder.shape and recorder.shape != tuple(video_TYXC.shape):
        found["other/size"] = 1.0
    return found


def pixel_mistakes(video_BTYXC: Tensor) -> dict[str, Tensor]:
    """Videos as common mistakes leave them, by name."""
    levels = video_BTYXC.float()
    return {
        "channels": video_BTYXC.flip(-1),
        "reversed": video_BTYXC.flip(1),
        "upside-down": video_BTYXC.flip(2),
        "mirrored": video_BTYXC.flip(3),
        "transposed": video_BTYXC.transpose(2, 3),
        "inverted": 255 - video_BTYXC,
        "frozen": video_BTYXC[:, :1].expand_as(video_BTYXC),
        # -1..1 taken for 0..1
        "clipped": (2 * levels - 255).clamp(min=0).to(video_BTYXC.dtype),
    }
