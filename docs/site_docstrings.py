"""Show this project's docstrings as they stand: an extension of griffe, which mkdocstrings uses.

A docstring here is text, with equations and tables of names indented or aligned by blanks. Such
paragraphs become blocks of fixed width; the others stay paragraphs.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

# Two blanks between words, in the middle of a line: the columns of a table.
_COLUMNS = re.compile(r"\S {2,}\S")


def markdown_of(docstring: str) -> str:
    """Return a docstring as Markdown."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.splitlines()
        has_indent = any(line.startswith("  ") for line in lines)
        has_columns = any(_COLUMNS.search(line) for line in lines)
        if has_indent or has_columns:
            parts.append(f"```text\n{paragraph}\n```")
        else:
            parts.append(escaped(paragraph))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Escape what Markdown would take for a link, emphasis or HTML, but not inside of `code`."""
    parts = re.split(r"(`+[^`]*`+)", text)
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"([\[\]*<])", r"\\\1", parts[place])
    return "".join(parts)


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring by `markdown_of`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)
