"""A trained DeScore model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm.adaptive import load_scorer

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Score


class DeScoreReward:
    """Scores by a DeScore folder, with the chains of thought as texts.

    The options are those of `rm.adaptive.load_scorer`. With ``thinking: adaptive`` the videos of
    a prompt are a group, which is scored by one way.
    """

    name = "descore"

    def __init__(self, checkpoint: str | Path, **options: Any) -> None:
        self.scorer = load_scorer(checkpoint, **options)
        # Only a scorer that thinks when unsure compares the videos of a prompt.
        self.group_level = getattr(self.scorer, "group_level", False)
        self.groups_by_prompt = self.group_level

    def check_group_size(self, size: int) -> None:
        """Raise ValueError if thinking is not calibrated for so many videos of a prompt."""
        if self.group_level:
            self.scorer.check_group_size(size)

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return self.scorer.score(video_BTYXC, prompts, fps=fps)
