"""DeScore as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm.scorer import DeScoreScorer

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Score


class DeScoreReward:
    """A trained DeScore folder; ``options`` go to `DeScoreScorer.load`. The chains of thought come back as texts."""

    name = "descore"

    def __init__(self, checkpoint: str | Path, **options: Any) -> None:
        self.scorer = DeScoreScorer.load(checkpoint, **options)

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return self.scorer.score(video_BTYXC, prompts, fps=fps)
