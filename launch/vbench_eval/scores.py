"""VBench's scores put together: normalised dimensions, quality, semantic, total, and a table of several models.

Numbers of VBench's scripts/constant.py, arithmetic of its scripts/cal_final_score.py. That program puts 0 for a
dimension that was not run; here what needs it is not run either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.vbench_eval.suite import DIMENSIONS

# (lowest, highest) of the dimensions whose scores do not fill 0..1
_LIMITS = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
_WEIGHTS = {"dynamic_degree": 0.5}  # all others weigh 1
QUALITY, SEMANTIC = DIMENSIONS[:7], DIMENSIONS[7:]
TOTALS = ("quality", "semantic", "total")
_QUALITY_SHARE = 0.8  # 4 parts of quality, 1 of semantic

Scores = Mapping[str, float | None]


def normalised(dimension: str, score: float) -> float:
    """(score - lowest) / (highest - lowest); it may leave 0..1."""
    low, high = _LIMITS.get(dimension, (0.0, 1.0))
    return (score - low) / (high - low)


def totals(scores: Scores) -> dict[str, float | None]:
    """quality and semantic, each the weighted MEAN over its normalised dimensions, and total; None if one is not run.

    total = (4 quality + semantic) / 5.
    """
    quality, semantic = (_weighted_mean(scores, names) for names in (QUALITY, SEMANTIC))
    total = (
        None
        if None in (quality, semantic)
        else _QUALITY_SHARE * quality + (1 - _QUALITY_SHARE) * semantic
    )
    return {"quality": quality, "semantic": semantic, "total": total}


def markdown(models: Mapping[str, Scores], notes: Sequence[str]) -> str:
    """A column for each model, and for each but the first its distance from the first; then the notes."""
    first, *others = models
    head = ["", *models, *(f"{name} - {first}" for name in others)]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in (*DIMENSIONS, *TOTALS):
        values = [scores.get(row) for scores in models.values()]
        cells = ["not run" if value is None else f"{value:.4f}" for value in values]
        differences = [
            "" if None in (values[0], value) else f"{value - values[0]:+.4f}"
            for value in values[1:]
        ]
        lines.append(_line([row.replace("_", " "), *cells, *differences]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _weighted_mean(scores: Scores, names: Sequence[str]) -> float | None:
    values = [scores.get(name) for name in names]
    if None in values:
        return None
    weights = [_WEIGHTS.get(name, 1.0) for name in names]
    parts = [
        w * normalised(name, value)
        for w, name, value in zip(weights, names, values, strict=True)
    ]
    return sum(parts) / sum(weights)


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(cells) + " |"
