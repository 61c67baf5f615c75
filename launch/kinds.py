"""The first word of a command line: `evaluate.py generator ...`, `sample.py vbench ...`."""

from __future__ import annotations

from collections.abc import Collection


def take_kind(words: list[str], kinds: Collection[str]) -> str | None:
    """Take the first of ``kinds`` out of ``words``; None if there is none.

    A launcher puts --local_rank=N in front of what the user typed, so it need not be the first word. The value of an
    option is not looked at.
    """
    options = [False, *(word in ("--config", "--resume") for word in words)]
    place = next((i for i, word in enumerate(words) if word in kinds and not options[i]), None)
    return None if place is None else words.pop(place)
