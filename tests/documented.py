"""The shell blocks of README.md and docs/: their commands, and the marks that say what a command needs.

A comment may hold marks: [GPU], [nodes], [downloads] for what is not at hand here, [long] for what takes more than a
test's time or memory. Behind a command it is that command's, in a line of its own that of all that follow in the block.
A command without any is run as it stands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = frozenset({"GPU", "nodes", "downloads", "long"})


@dataclass(frozen=True)
class Command:
    """One of a block's commands, continued lines and a loop's joined; ``place`` is the page and the block's line."""

    place: str
    text: str
    marks: frozenset[str]

    @property
    def bare(self) -> str:
        """Without comments."""
        return "\n".join(
            line.split("  #")[0].rstrip() for line in self.text.splitlines()
        )

    @property
    def program(self) -> list[str]:
        """The words from launch/NAME.py on, without what a loop puts in; empty when it starts none of them."""
        match = re.search(r"(?:^|\s)(launch/\w+\.py\b[^\n]*)", self.bare)
        return (
            [word for word in shlex.split(match[1]) if not word.startswith("$")]
            if match
            else []
        )


def commands(page: Path) -> Iterator[Command]:
    """All of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```bash\n(.*?)^```", text, re.S | re.M):
        place, above = f"{page.name}:{text[: block.start()].count(chr(10)) + 1}", ""
        for one in _split(block[1].replace("\\\n", " ").splitlines()):
            if one.startswith("#"):
                above = one
                continue
            comments = " ".join([above, *re.findall(r"\s#(.*)", one)])
            yield Command(place, one, frozenset(re.findall(r"\[(\w+)\]", comments)))


def _split(lines: list[str]) -> Iterator[str]:
    """Lines, where those of a loop are one."""
    loop: list[str] = []
    for line in lines:
        if line.startswith("for ") or loop:
            loop.append(line)
        if loop and line == "done":
            yield "\n".join(loop)
            loop = []
        elif not loop and line.strip():
            yield line
    assert not loop, loop


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    """Place and text of every fenced block of a language, on all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{kind}\n(.*?)^```", text, re.S | re.M):
            yield f"{page.name}:{text[: block.start()].count(chr(10)) + 1}", block[1]


COMMANDS = [command for page in PAGES for command in commands(page)]
