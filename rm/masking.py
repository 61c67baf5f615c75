"""Random masking of the chain of thought (CoT) in stage 1 of DeScore (arXiv 2605.05922).

Masking makes the reward lean on the video as well as on the CoT. It removes text before
tokenising, so positions close up and a masked CoT equals a CoT that was never written. The
draws depend on the seed, the epoch and the row only, not on the ranks. Evaluation never masks.
"""

from __future__ import annotations

import re

from common.distributed import derive_seed
from rm.config import Masking

_ANSWER = re.compile(r"(<answer>.*?</answer>)", re.DOTALL)
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_PARAGRAPH_START = re.compile(r"(?<=\n\n)(?=\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s+\S)|(?<=[^.!?\s]\n)(?=\S)")


def mask(
    cots: tuple[str, str], how: Masking, *, seed: int, epoch: int, row: int
) -> tuple[str, str]:
    """Drop each unit of both CoTs of a pair with probability ``how.probability``.

    With ``how.per == "pair"`` unit i of both CoTs shares a draw; with "video" each has a
    draw of its own.
    """
    masked = []
    for side, cot in zip("AB", cots, strict=True):
        side_key = () if how.per == "pair" else (side,)
        rest = ""
        for i, text in enumerate(units(cot, how.unit)):
            # The unit "cot" has no number in its seed.
            unit_key = () if how.unit == "cot" else (i,)
            drawn = derive_seed(seed, "mask", epoch, row, *side_key, *unit_key)
            if drawn / 2**63 >= how.probability:
                rest += text
        masked.append(rest)
    return masked[0], masked[1]


def units(cot: str, unit: str) -> list[str]:
    """Cut a CoT into the units that are dropped or kept; joined they give the CoT again.

    "cot"       The unit is the full text.
    "section"   The units are paragraphs, or lines if the text has no empty line.
    "sentence"  The units end at ``.``, ``!``, ``?`` or the end of a line.

    An answer block is always a single unit.
    """
    if unit == "cot":
        return [cot]
    if unit == "sentence":
        boundary = _SENTENCE_END
    else:
        boundary = _PARAGRAPH_START if "\n\n" in cot else _LINE_START
    parts: list[str] = []
    for piece in _ANSWER.split(cot):
        if piece.startswith("<answer>"):
            parts.append(piece)
        else:
            parts += boundary.split(piece)
    return [part for part in parts if part]


def dropped_share(cot: str, rest: str) -> float:
    """Share of a CoT's characters that masking removed; 0 for an empty CoT."""
    if not cot:
        return 0.0
    return 1.0 - len(rest) / len(cot)
