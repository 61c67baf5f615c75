"""Pairs that a table gives more than once, with equal or different labels, or in two tables."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rm.pair import Pair

# The prompt and both files, in an order that does not depend on which of them is A.
Key = tuple[str, str, str]


class _FileNames:
    """Real paths, each looked up once: a table names a file many times."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, file: Path) -> str:
        if file not in self._known:
            self._known[file] = os.path.realpath(file)
        return self._known[file]


def describe_repeated(pairs: Sequence[Pair]) -> list[str]:
    """Count the pairs that repeat an earlier one, and those that contradict one.

    A pair repeats another if it has the same prompt and the same files, in either order.
    """
    # The label that every occurrence gives to the file that is first by name.
    names = _FileNames()
    occurrences: dict[Key, list[tuple[int, int]]] = defaultdict(list)
    for pair in pairs:
        key, swapped = _key(pair, names)
        label = -pair.label if swapped else pair.label
        occurrences[key].append((pair.line, label))

    # Count rows, and remember where the first of each kind is.
    repeated = 0
    contradicted = 0
    first_repeated = first_contradicted = ""
    for (line, label), *later in occurrences.values():
        if later:
            repeated += len(later)
            first_repeated = first_repeated or f"{line} and {later[0][0]}"
        others = [place for place, other in later if other != label]
        if others:
            contradicted += 1
            first_contradicted = first_contradicted or f"{line} and {others[0]}"
    remarks = []
    if repeated:
        remarks.append(
            "rows that repeat the prompt and the videos of an earlier row: "
            f"{repeated} (first in lines {first_repeated})"
        )
    if contradicted:
        remarks.append(
            "pairs whose rows have labels that contradict each other: "
            f"{contradicted} (first in lines {first_contradicted})"
        )
    return remarks


def describe_overlap(train: Sequence[Pair], heldout: Sequence[Pair]) -> str:
    """Count the held-out pairs, and held-out videos, that are trained on; "" for none."""
    names = _FileNames()
    trained_pairs = {_key(pair, names)[0] for pair in train}
    trained_files = {names.of(file) for pair in train for file in _files(pair)}

    # Held-out pairs, then held-out files.
    shared = [pair for pair in heldout if _key(pair, names)[0] in trained_pairs]
    files = {names.of(file) for pair in heldout for file in _files(pair)}
    both = sorted(files & trained_files)
    if not both:
        return ""
    first = f"line {shared[0].line} of the held-out table" if shared else both[0]
    return (
        f"{len(shared)} of {len(heldout)} held-out pairs and {len(both)} of {len(files)} "
        f"held-out videos are trained on as well (the first: {first}): held-out accuracy "
        "will be too high"
    )


def _files(pair: Pair) -> tuple[Path, Path]:
    return (pair.video_A, pair.video_B)


def _key(pair: Pair, names: _FileNames) -> tuple[Key, bool]:
    """The key of a pair, and whether A and B are in the other order there."""
    file_A = names.of(pair.video_A)
    file_B = names.of(pair.video_B)
    swapped = file_B < file_A
    first, second = sorted((file_A, file_B))
    return (pair.prompt, first, second), swapped
