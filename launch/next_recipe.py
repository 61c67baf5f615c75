"""The recipe that a command's last line, ``next: ...``, names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common.shipped import shipped

FULL_SIZE = "configs/wan"


def next_recipe(name: str, words: Sequence[str] | None = None) -> str:
    """Return the config NAME.yaml beside the first ``--config`` that has it, else full size's.

    ``words`` is a command line, by default this process's.
    """
    words = sys.argv[1:] if words is None else words
    for place, word in enumerate(words):
        # --config FILE and --config=FILE
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        if not equals:
            value = "".join(words[place + 1 : place + 2])
        beside = Path(value).parent / f"{name}.yaml"
        if shipped(beside).is_file():
            return beside.as_posix()
    return f"{FULL_SIZE}/{name}.yaml"
