"""Texts of a page: names of folders, paths without this machine's folders, safe characters."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# Characters that HTML cannot hold; a new line and a tab are not among them.
# Control characters, surrogates, and marks that turn the direction of the text after them.
_BAD_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# An absolute path of a setting or a command; not what follows a host, or a fraction.
_ABSOLUTE = re.compile(r"(?<![\w.:/~%)-])/(?:[^\s/'\"\],:;]+/)*[^\s/'\"\],:;]+")


def clean(text: object) -> str:
    """Replace control characters and surrogates; the template escapes the rest."""
    return _BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", str(text))


def folder_names(folders: Sequence[Path], root: Path | None = None) -> dict[Path, str]:
    """Name folders by their paths below the last one that holds all of them, and ``root``.

    A folder alone has its own name, and demo/grpo and demo/descore have these names.
    """
    if not folders:
        return {}
    places = [folder.resolve() for folder in folders]
    roots = [] if root is None else [root.resolve()]
    # The common folder belongs to the names, the path to it does not.
    common = os.path.commonpath(places + roots)
    above = Path(common).parent
    names = {}
    for folder, place in zip(
        folders,
        places,
        strict=True,
    ):
        names[folder] = str(place.relative_to(above))
    return names


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by as many of the last parts of its path as tell all of them apart.

    Raises ValueError if a folder is there twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError("a folder is named twice, so there is nothing to compare")

    # As many parts for every folder, until no two names are equal.
    count = 1
    names: list[str] = []
    while len(set(names)) < len(parts):
        names = ["/".join(path[-count:]) for path in parts]
        count += 1
    return names


def hide_folders(text: str) -> str:
    """Shorten the absolute paths in a text of settings or of a command.

    Below the working folder a path becomes relative, elsewhere at most its last two parts are
    kept.
    """

    # Every path on its own.
    return _ABSOLUTE.sub(_shorter, text)


def _shorter(match: re.Match[str]) -> str:
    path = Path(match[0])
    here = Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    # Whose home it is belongs to no page: two folders below the root are left out.
    below = path.parts[3:]
    kept = below[-2:] or path.parts[-1:]
    return "/".join(["\N{HORIZONTAL ELLIPSIS}", *kept])
