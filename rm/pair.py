"""Pair: two videos of a prompt, and which of them people prefer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """Two videos of a prompt, and which of them people prefer.

    video_A, video_B    Files.
    cot_A, cot_B        Chains of thought (CoTs), "" if there are none.
    label               1 if A is better, -1 if B is better, 0 for a tie.
    scores_A, scores_B  Ground-truth sub-dimension scores, for which stage 2 rewards CoTs; None
                        if unknown.
    labels              Labels of further dimensions by name; unknown labels are left out.
    line                Line of the CSV, 0 for a pair from elsewhere.
    """

    prompt: str
    video_A: Path
    video_B: Path
    cot_A: str
    cot_B: str
    label: int
    scores_A: Mapping[str, int | None] | None = None
    scores_B: Mapping[str, int | None] | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    line: int = 0

    def __post_init__(self) -> None:
        for label in (self.label, *self.labels.values()):
            if label not in (1, -1, 0):
                raise ValueError(f"Pair.label must be 1, -1 or 0, got {label}")

    def label_in(self, dimension: str) -> float:
        """The label in a dimension: 1, -1, 0, or NaN if unknown.

        It is the label of that name. Without it, "overall" is ``label``, and in a sub-dimension
        the video with the higher ground-truth score is better.
        """
        # A label of that name.
        if dimension in self.labels:
            return float(self.labels[dimension])
        if dimension == "overall":
            return float(self.label)

        # The ground-truth scores.
        score_A = (self.scores_A or {}).get(dimension)
        score_B = (self.scores_B or {}).get(dimension)
        if score_A is None or score_B is None:
            return math.nan
        if score_A == score_B:
            return 0.0
        return 1.0 if score_A > score_B else -1.0
