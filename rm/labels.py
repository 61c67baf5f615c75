"""The words that tables of preference pairs use for a label, the same in every layout."""

from __future__ import annotations

import re

# Every spelling is compared in lower case, without a final period, and with single blanks in
# place of underscores and of hyphens between letters. Numbers alone are no label: "1" may mean
# the first video, or the index of the second.
_A = (
    "a",
    "video a",
    "video 1",
    "video1",
    "first",
    "first video",
    "left",
    "left video",
    "left vote",
    "leftvote",
    "model a",
)
_B = (
    "b",
    "video b",
    "video 2",
    "video2",
    "second",
    "second video",
    "right",
    "right video",
    "right vote",
    "rightvote",
    "model b",
)
_TIE = (
    "same",
    "the same",
    "tie",
    "tie vote",
    "tievote",
    "tied",
    "draw",
    "equal",
    "equally good",
    "equally bad",
    "no preference",
    "both",
    "both equal",
    "both are equal",
    "both same",
    "both are the same",
    "both good",
    "both are good",
    "both good vote",
    "bothgood",
    "bothgood vote",
    "both bad",
    "both are bad",
    "both bad vote",
    "bothbad",
    "bothbad vote",
)
# A preference may also be a sentence.
_ENDINGS = ("", " is better", " wins", " is preferred", " better")
INVALID = "invalid"
# What table programs write for an empty cell.
EMPTY = {"", "nan", "none", "null"}


def _spellings() -> dict[str, int]:
    table = dict.fromkeys(_TIE, 0)
    for words, label in ((_A, 1), (_B, -1)):
        for word in words:
            for ending in _ENDINGS:
                table[word + ending] = label
    return table


_LABELS = _spellings()


def read_label(cell: str) -> int | None:
    """Read a preference: 1 if A is better, -1 if B is better, 0 for a tie, None otherwise."""
    return _LABELS.get(_plain(cell))


def is_invalid(cell: str) -> bool:
    """True for a cell in which people called the pair invalid."""
    return _plain(cell) == INVALID


def is_empty(cell: str | None) -> bool:
    """True for a cell without content, or with a table program's word for that."""
    return cell is None or cell.strip().lower() in EMPTY


def _plain(cell: str) -> str:
    """The cell in the spelling of the table above."""
    text = re.sub(r"[\s_]+|(?<=[a-z])-(?=[a-z])", " ", cell.lower()).strip()
    return text.rstrip(".!").rstrip()
