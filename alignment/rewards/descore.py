"""A trained DeScore model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm.scorer import DeScoreScorer

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Score


class DeScoreReward:
    """Scores by a DeScore folder, with the chains of thought as texts.

    The options are those of `rm.scorer.DeScoreScorer.load`.
    """

    name = "descore"

    def __init__(self, checkpoint: str | Path, **options: Any) -> None:
        self.scorer = DeScoreScorer.load(checkpoint, **options)

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return self.scorer.score(video_BTYXC, prompts, fps=fps)
