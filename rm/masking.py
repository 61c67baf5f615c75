"""Random masking of the chain of thought in stage 1: the score must lean on the video and on the thought (spec 2.3).

Masking removes text; its tokens are absent and positions close up, so a masked chain is a chain never written. What is
dropped is a function of the seed, the epoch and the row, whatever the ranks. Evaluation never masks.
"""

from __future__ import annotations

import re

from common.distributed import derive_seed
from rm.config import Masking

_ANSWER = re.compile(r"(<answer>.*?</answer>)", re.DOTALL)
_CUT = {
    "section": re.compile(r"(?<=\n)(?=\S)"),  # a line that follows another, see `units`
    "paragraph": re.compile(r"(?<=\n\n)(?=\S)"),
    "sentence": re.compile(r"(?<=[.!?])(?=\s+\S)|(?<=[^.!?\s]\n)(?=\S)"),
}


def mask(
    chains: tuple[str, str], how: Masking, *, seed: int, epoch: int, row: int
) -> tuple[str, str]:
    """Both chains of a pair with their masked units removed, each with probability ``how.probability``.

    "pair": unit i of both chains is dropped or kept together; "video": each for itself.
    """
    kept = []
    for side, chain in zip("AB", chains, strict=True):
        who = () if how.per == "pair" else (side,)
        parts = units(chain, how.unit)
        # the whole chain has no number, so that a seed masks what it masked before there were units
        numbers = [()] if how.unit == "cot" else [(i,) for i in range(len(parts))]
        drawn = [
            derive_seed(seed, "mask", epoch, row, *who, *number) / 2**63
            for number in numbers
        ]
        kept.append(
            "".join(
                part
                for part, u in zip(parts, drawn, strict=False)
                if u >= how.probability
            )
        )
    return kept[0], kept[1]


def units(chain: str, unit: str) -> list[str]:
    """What is dropped or kept as one; joined they are the chain.

    "cot"     the whole text
    "section"   paragraphs, or lines where there is no empty line
    "sentence"  up to ``.``, ``!``, ``?`` or the end of a line

    An answer block is one unit, whatever stands in it.
    """
    if unit == "cot":
        return [chain]
    rule = _CUT["paragraph" if unit == "section" and "\n\n" in chain else unit]
    parts: list[str] = []
    for piece in _ANSWER.split(chain):
        parts += [piece] if piece.startswith("<answer>") else rule.split(piece)
    return [part for part in parts if part]


def dropped_share(chain: str, kept: str) -> float:
    """Of the characters; 0 for an empty chain."""
    return 1.0 - len(kept) / len(chain) if chain else 0.0
