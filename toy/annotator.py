"""The annotator of the embedded world: sub-dimension scores that are mostly right.

Base models learn the form of an answer from examples that a stronger model or a person has
annotated (DeScore, arXiv 2605.05922, section 3, uses Gemini). Such annotations have mistakes. The
annotator sees the scores of the oracle (`toy.measure`) and gets some of them wrong; it knows
neither the people's utility nor any preference.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from toy.world import SUB_DIMENSIONS

# Share of the sub-dimension scores that an annotation has right.
RIGHT = 0.78
PRIMARY = ("subject", "dynamics")
# Band of the overall score by the lower and the higher primary score; 2 for (0, 1) and (0, 2).
BANDS = {
    (0, 0): 1,
    (1, 1): 3,
    (1, 2): 3,
    (2, 2): 4,
}


def annotate(
    scores: Mapping[str, int], rng: random.Random, right: float = RIGHT
) -> dict[str, int]:
    """Copy the scores; each is replaced by another of 0, 1 and 2 with probability 1 - ``right``."""
    annotated = {}
    for name, score in scores.items():
        others = [other for other in (0, 1, 2) if other != score]
        # Both are drawn always, so that a score does not depend on the mistakes before it.
        mistake = rng.choice(others)
        annotated[name] = score if rng.random() < right else mistake
    return annotated


def overall_score(scores: Mapping[str, int]) -> float:
    """State the overall score from 1.00 to 5.00 of five sub-dimension scores.

    The instruction's rule (2605.05922, released prompt): 5 if all are 2; 4.00 to 4.99 if both
    primary ones are 2; 3.00 to 3.99 if a primary one is 1 and none 0; 2.00 to 2.99 if one is 0;
    1.00 to 1.99 if both are. Inside a band the three secondary scores decide, in equal steps.
    """
    first, second = (scores[name] for name in PRIMARY)
    band = BANDS.get((min(first, second), max(first, second)), 2)

    # The secondary ones decide inside the band.
    secondary = 0
    for name in SUB_DIMENSIONS:
        if name not in PRIMARY:
            secondary += scores[name]
    if band == 4 and secondary == 6:
        return 5.0
    return band + 0.99 * secondary / 6
