"""Compute VBench's quality, semantic and total scores, and a table of several models.

The numbers are those of VBench's scripts/constant.py, the arithmetic is that of its
scripts/cal_final_score.py. That script puts 0 for a dimension that was not run; here the totals
that need the dimension are not run either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.vbench_eval.suite import DIMENSIONS

# (lowest, highest) of the dimensions whose scores do not fill 0..1.
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
# All other dimensions weigh 1.
_WEIGHTS = {"dynamic_degree": 0.5}
QUALITY = DIMENSIONS[:7]
SEMANTIC = DIMENSIONS[7:]
TOTALS = ("quality", "semantic", "total")
# Four parts of quality, one part of semantic.
_QUALITY_SHARE = 0.8

Scores = Mapping[str, float | None]


def normalised(dimension: str, score: float) -> float:
    """Return (score - lowest) / (highest - lowest), which may leave 0..1."""
    low, high = _LIMITS.get(dimension, (0.0, 1.0))
    return (score - low) / (high - low)


def totals(scores: Scores) -> dict[str, float | None]:
    """Return quality, semantic and total; None for a score that lacks a dimension.

    quality and semantic are each the weighted MEAN over their normalised dimensions, and
    total = (4 quality + semantic) / 5.
    """
    quality = _weighted_mean(scores, QUALITY)
    semantic = _weighted_mean(scores, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = _QUALITY_SHARE * quality + (1 - _QUALITY_SHARE) * semantic
    return {"quality": quality, "semantic": semantic, "total": total}


def markdown(models: Mapping[str, Scores], notes: Sequence[str]) -> str:
    """Return a table with a column a model, then each model's difference from the first."""
    first, *others = models
    head = [
        "",
        *models,
        *(f"{name} - {first}" for name in others),
    ]
    lines = [
        _line(head),
        _line(["---"] * len(head)),
    ]
    for row in (*DIMENSIONS, *TOTALS):
        cells = [row.replace("_", " ")]
        values = [scores.get(row) for scores in models.values()]
        for value in values:
            cells.append("not run" if value is None else f"{value:.4f}")

        # Differences from the first model.
        base = values[0]
        for value in values[1:]:
            unknown = base is None or value is None
            cells.append("" if unknown else f"{value - base:+.4f}")
        lines.append(_line(cells))

    # The notes are a list below the table.
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _weighted_mean(scores: Scores, names: Sequence[str]) -> float | None:
    total = 0.0
    weights = 0.0
    for name in names:
        score = scores.get(name)
        if score is None:
            return None
        weight = _WEIGHTS.get(name, 1.0)
        total += weight * normalised(name, score)
        weights += weight
    return total / weights


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
