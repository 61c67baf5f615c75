"""Measure how dense the source is: `python tests/style.py [FILES...]`, or `make style`.

Tokens a line of code: tokens as Python's tokenizer yields them, without comments,
docstrings and line ends, over the lines that hold code. Comment share: lines with a
comment, over lines with code or a comment. Without arguments it measures all tracked
source outside tests/. The exit status is 1 when a limit is broken; long files and
functions are only listed.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

MAX_TOKENS_PER_LINE = 7.6  # on average
MAX_TOKENS_PER_LINE_OF_A_FILE = 9.0
MIN_COMMENT_SHARE = 0.06
MAX_COLUMNS = 100

# Alarms: a file that meets them by packing is worse than one that breaks them.
LONG_FILE = 400
LONG_FUNCTION = 80

LAYOUT_TOKENS = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FileMeasure:
    """Counts of one file, the names of its classes, and its alarms."""

    tokens: int
    code_lines: int
    comment_lines: int
    long_lines: int
    classes: list[str]
    alarms: list[str]


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the line numbers of all docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, Definition) or not node.body:
            continue
        first = node.body[0]
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        if is_text and isinstance(first.value.value, str):
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def measure(path: Path) -> FileMeasure:
    """Count the tokens and lines of a file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings = docstring_lines(tree)

    # Tokens and the lines that they stand on.
    tokens = 0
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT_TOKENS or token.start[0] in docstrings:
            continue
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
            continue
        tokens += 1
        code.update(range(token.start[0], token.end[0] + 1))

    # Classes, and what is too long.
    lines = source.splitlines()
    alarms = []
    if len(lines) > LONG_FILE:
        alarms.append(f"{path} has {len(lines)} lines")
    classes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            classes.append(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > LONG_FUNCTION:
                alarms.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    long_lines = sum(len(line) > MAX_COLUMNS for line in lines)
    return FileMeasure(tokens, len(code), len(comments), long_lines, classes, alarms)


def tracked_source() -> list[Path]:
    """Return the Python files under version control, but for the tests."""
    command = ["git", "ls-files", "*.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    files = [
        Path(name) for name in done.stdout.split() if not name.startswith("tests/")
    ]
    return [file for file in files if file.exists()]


def problems_of(measures: dict[Path, FileMeasure]) -> list[str]:
    """Return a line for every limit that is broken, by a file or by all together."""
    problems = []
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for path, found in measures.items():
        density = found.tokens / max(1, found.code_lines)
        if found.code_lines > 20 and density > MAX_TOKENS_PER_LINE_OF_A_FILE:
            problems.append(f"{path}: {density:.2f} tokens a line")
        if found.long_lines:
            problems.append(
                f"{path}: {found.long_lines} lines over {MAX_COLUMNS} columns"
            )
        for name in found.classes:
            owners[name].append(str(path))
    for name, paths in sorted(owners.items()):
        if len(paths) > 1:
            problems.append(f"class {name} is defined in {', '.join(paths)}")
    if density_of(measures) > MAX_TOKENS_PER_LINE:
        problems.append(f"more than {MAX_TOKENS_PER_LINE} tokens a line on average")
    if comment_share_of(measures) < MIN_COMMENT_SHARE:
        problems.append(f"less than {MIN_COMMENT_SHARE:.0%} comment lines")
    return problems


def density_of(measures: dict[Path, FileMeasure]) -> float:
    """Return the tokens of all files over their lines of code."""
    tokens = sum(found.tokens for found in measures.values())
    return tokens / max(1, sum(found.code_lines for found in measures.values()))


def comment_share_of(measures: dict[Path, FileMeasure]) -> float:
    """Return the comment lines of all files over their lines of code or comment."""
    comments = sum(found.comment_lines for found in measures.values())
    code = sum(found.code_lines for found in measures.values())
    return comments / max(1, code + comments)


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or tracked_source()
    measures = {path: measure(path) for path in files}
    problems = problems_of(measures)
    for found in measures.values():
        for alarm in found.alarms:
            sys.stdout.write(f"note: {alarm}\n")
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    tokens = sum(found.tokens for found in measures.values())
    sys.stdout.write(
        f"{len(files)} files, {tokens} tokens, {density_of(measures):.2f} tokens a line, "
        f"{comment_share_of(measures):.1%} comment lines\n"
    )
    sys.exit(int(bool(problems)))


if __name__ == "__main__":
    main()
