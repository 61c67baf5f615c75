"""Read the shell commands of README.md and docs/, and the marks in their comments.

Marks: [GPU], [nodes] and [downloads] need what is not at hand here, [long] takes more than a
test's time or memory. A comment after a command marks that command; a comment line marks all
commands that follow in the block. Commands without a mark are run by the tests.
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
    """A command of a block, with continued lines and loops joined.

    ``place`` is the page and the line of the block.
    """

    place: str
    text: str
    marks: frozenset[str]

    @property
    def bare(self) -> str:
        """Return the command without comments."""
        return "\n".join(
            line.split("  #")[0].rstrip() for line in self.text.splitlines()
        )

    @property
    def program(self) -> list[str]:
        """Return the words from ROOM/NAME.py on, without variables; empty for other commands."""
        match = re.search(
            r"(?:^|\s)((?:launch|toy|experiments)/[\w/]+\.py\b[^\n]*)", self.bare
        )
        return (
            [word for word in shlex.split(match[1]) if not word.startswith("$")]
            if match
            else []
        )


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page in their order."""
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
    """Yield the lines of a block, with the lines of a loop joined."""
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
    """Yield place and text of every fenced block of a language, on all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{kind}\n(.*?)^```", text, re.S | re.M):
            yield f"{page.name}:{text[: block.start()].count(chr(10)) + 1}", block[1]


COMMANDS = [command for page in PAGES for command in commands(page)]
