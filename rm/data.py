"""Preference pairs from the official CSV, and which of them a step sees.

The pairs of a step are a function of seed and step only.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.csv_table import CsvTable, missing_columns, read_csv
from common.schedule import IndexSchedule
from rm.labels import is_empty, is_invalid, read_label
from rm.own_columns import renamed
from rm.pair import Pair
from rm.prompt import DIMENSIONS, parse_scores
from rm.repeated_pairs import describe_repeated

REQUIRED_COLUMNS = ("videos", "prompt", "GSB")
# Columns that only one layout of `rm.benchmarks` has, to recognise a table of another layout.
LAYOUT_COLUMNS = {
    "descore": ("videos", "GSB"),
    "videogen": ("path_A", "path_B"),
    "genai": ("left_video_path", "right_video_path", "vote_type"),
    "indomain": ("video_A", "video_B", "answer"),
}
# A path of Windows in a Python list: "\\a" in it is a control character.
_BACKSLASHES = "a backslash begins an escape in a list, so write paths with /"


@dataclass(frozen=True)
class PairTable:
    """The content of a CSV.

    pairs     Usable pairs in file order.
    invalid   The number of rows that are labelled invalid.
    problems  A description of each bad row.
    """

    path: Path
    pairs: tuple[Pair, ...]
    invalid: int
    problems: tuple[str, ...]

    def report(self, limit: int = 10) -> str:
        """Summarise the table in a few lines."""
        ties = sum(pair.label == 0 for pair in self.pairs)
        lines = [
            f"{self.path}: {len(self.pairs)} pairs, {ties} of them ties; "
            f"{self.invalid} labelled invalid; {len(self.problems)} bad rows left out"
        ]
        lines += self.problems[:limit]
        if len(self.problems) > limit:
            lines.append(f"... and {len(self.problems) - limit} more")
        lines += self.remarks()
        return "\n  ".join(lines)

    def remarks(self) -> list[str]:
        """Describe what is no mistake of a row: labels that are missing, pairs that repeat."""
        # Further labels that only some of the pairs have.
        names = dict.fromkeys(name for pair in self.pairs for name in pair.labels)
        lines = []
        for name in names:
            without = sum(name not in pair.labels for pair in self.pairs)
            if without:
                lines.append(f"pairs without a label in {name}: {without}")
        return lines + describe_repeated(self.pairs)


def read_pairs(
    path: str | Path,
    *,
    require_cot: bool = True,
    require_scores: bool = False,
    dimensions: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> PairTable:
    """Read a CSV with the official columns, or the only CSV of a folder.

    videos        Python literal ``['a.mp4', 'b.mp4']``, relative to the CSV.
    prompt        The text prompt; the template makes the instruction from it.
    GSB           A, B, same or invalid, see `rm.labels`.
    CoT_A, CoT_B  Chains of thought.
    answer        Text with an ``<answer>`` block: JSON with ``video_1_scores`` and
                  ``video_2_scores`` (the official stage 2).

    Other columns are not read. The arguments:

    require_cot     A row without both CoTs is bad; otherwise its CoTs are empty.
    require_scores  A row without a readable ``answer`` is bad; otherwise its scores are unknown.
    dimensions      Names of columns with more labels, in the words of GSB; only an empty cell
                    is an unknown label. "overall" is GSB, and a sub-dimension without a
                    column is read from ``answer``.
    columns         The table's own names of these columns, see `rm.own_columns`.

    Bad rows are left out and described as ``file:line: problem``. Raises ValueError, naming the
    file, for an unreadable table, a missing column, or a table without a usable row.
    """
    # The columns that must be there.
    path = csv_file(Path(path))
    required = list(REQUIRED_COLUMNS)
    if require_cot:
        required += ["CoT_A", "CoT_B"]
    if require_scores:
        required.append("answer")
    for name in dimensions:
        if name not in ("overall", *DIMENSIONS):
            required.append(name)

    # Every row gives a pair, with its further labels and its ground-truth scores.
    def make_pair(row: Mapping[str, str], label: str) -> Pair:
        pair = _pair(row, label, path.parent, require_cot=require_cot)
        pair = replace(pair, labels=labels_in(row, dimensions))
        scores = parse_scores(row.get("answer", ""))
        if scores is not None:
            return replace(pair, scores_A=scores[0], scores_B=scores[1])
        if require_scores:
            raise ValueError(
                "answer must hold an <answer> block with video_1_scores and "
                "video_2_scores, each with 2, 1, 0 or N/A under some of "
                f"{', '.join(DIMENSIONS)}, got {row['answer']!r:.80}"
            )
        return pair

    return collect(path, required, "GSB", make_pair, columns=columns)


def collect(
    path: Path,
    required: list[str],
    label_column: str,
    make_pair: Callable[[Mapping[str, str], str], Pair],
    word_in: Callable[[str], str] = str.strip,
    columns: Mapping[str, str] | None = None,
) -> PairTable:
    """Build a table with ``make_pair(row, label text)``; its ValueError makes a row bad.

    ``word_in`` finds the label's text in its cell, and ``columns`` are the table's own names. Rows
    labelled invalid are counted. Raises ValueError as `read_pairs`.
    """
    try:
        csv_table = read_csv(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    csv_table = renamed(csv_table, columns or {})
    _check_columns(csv_table, required)

    # Every row is a pair, labelled invalid, or bad.
    pairs = []
    problems = []
    invalid = 0
    for row in csv_table.rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            label = word_in(row.cells[label_column])
            if is_invalid(label):
                invalid += 1
                continue
            pair = make_pair(row.cells, label)
            _check_two_films(pair)
            pairs.append(replace(pair, line=row.line))
        except ValueError as error:
            problems.append(f"{path}:{row.line}: {error}")
    if not pairs:
        raise ValueError("\n  ".join([f"{path}: no usable pair", *problems[:10]]))
    return PairTable(path, tuple(pairs), invalid, tuple(problems))


def _check_columns(table: CsvTable, required: Sequence[str]) -> None:
    """Raise ValueError for missing columns, with the layout that the table seems to have."""
    problem = missing_columns(table, required)
    if not problem:
        return
    for layout, columns in LAYOUT_COLUMNS.items():
        if set(columns) <= set(table.columns) and not set(columns) <= set(required):
            problem += (
                f"; they are those of the layout {layout}: set data.layout={layout} "
                f"(table.layout in launch/pairs.py, layout in launch/evaluate.py)"
            )
    if {"CoT_A", "CoT_B"} & (set(required) - set(table.columns)):
        problem += (
            "; without chains of thought, cold_start.masking.probability=1 trains a reward model "
            "that writes none"
        )
    problem += "; columns of other names are named by data.columns"
    raise ValueError(problem)


def _check_two_films(pair: Pair) -> None:
    """Raise ValueError if both videos of a pair are the same file."""
    if os.path.samefile(pair.video_A, pair.video_B):
        raise ValueError(f"both videos are the same file, {pair.video_A}")


@dataclass(frozen=True)
class PairDraw:
    """A pair of a step: its row in the table, and its epoch, counted from 0."""

    row: int
    epoch: int


class PairSchedule:
    """Maps a step to its pairs, by `common.schedule.IndexSchedule`."""

    def __init__(self, count: int, *, pairs_per_step: int, seed: int) -> None:
        if count < 1 or pairs_per_step < 1:
            raise ValueError(
                "a schedule needs pairs and pairs_per_step >= 1, "
                f"got {count} and {pairs_per_step}"
            )
        self.count = count
        self.pairs_per_step = pairs_per_step
        self._indices = IndexSchedule(
            count, seed=seed, per_step=pairs_per_step, name="pairs"
        )

    def steps(self, epochs: float) -> int:
        """Steps that see every pair ``epochs`` times, rounded to the nearest, at least 1."""
        return max(1, round(epochs * self.count / self.pairs_per_step))

    def at(self, step: int) -> list[PairDraw]:
        """The pairs of a step (from 0), of all ranks."""
        first = step * self.pairs_per_step
        draws = []
        for number, row in enumerate(self._indices.at(step), first):
            draws.append(PairDraw(row, epoch=number // self.count))
        return draws


def csv_file(path: Path) -> Path:
    """A CSV file, or the only CSV of a folder. Raises ValueError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.csv"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path}: a data folder holds one CSV file, not: {names}. Give the file itself"
        )
    return files[0]


def _pair(row: Mapping[str, str], label: str, root: Path, *, require_cot: bool) -> Pair:
    """Make the pair of a row of the official table. Raises ValueError if the row is bad."""
    value = read_label(label)
    if value is None:
        raise ValueError(f"GSB must be A, B, same or invalid, got {label!r:.80}")
    # Both videos.
    files = [root / video for video in _two_paths(row["videos"])]
    check_videos(files)

    # The prompt and the CoTs.
    prompt = prompt_in(row)
    cot_A = _text(row.get("CoT_A"))
    cot_B = _text(row.get("CoT_B"))
    if require_cot and not (cot_A and cot_B):
        raise ValueError(f"{'CoT_B' if cot_A else 'CoT_A'} is empty")
    return Pair(prompt, files[0], files[1], cot_A, cot_B, value)


def _two_paths(cell: str) -> list[str]:
    """The paths in a cell of the column ``videos``. Raises ValueError if it is bad."""
    try:
        # A backslash of a Windows path is a wrong escape, which Python warns about.
        with warnings.catch_warnings(action="ignore"):
            videos = ast.literal_eval(cell)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        videos = None
    if (
        not isinstance(videos, list | tuple)
        or len(videos) != 2
        or not all(isinstance(video, str) for video in videos)
    ):
        hint = f"; {_BACKSLASHES}" if "\\" in cell else ""
        raise ValueError(f"videos must be a list of two paths, got {cell!r:.80}{hint}")
    return list(videos)


def label_rows(pairs: Sequence[Pair], dimensions: Iterable[str]) -> list[list[float]]:
    """Labels of every pair in every dimension, see `Pair.label_in`."""
    names = list(dimensions)
    return [[pair.label_in(name) for name in names] for pair in pairs]


def label_of_total(pair: Pair, dimensions: Collection[str]) -> float:
    """The label that the summed reward is compared with.

    It is the overall preference, or for a reward model of a single dimension the label in it.
    """
    if len(dimensions) == 1:
        return pair.label_in(*dimensions)
    return float(pair.label)


def labels_in(row: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """Labels in the columns of these names; empty cells and invalid labels are left out.

    Raises ValueError, with the column, for a word that is no label.
    """
    labels = {}
    for name in names:
        cell = row.get(name)
        if is_empty(cell) or is_invalid(cell):
            continue
        label = read_label(cell)
        if label is None:
            raise ValueError(
                f"{name} must be A, B, same, invalid or empty, got {cell!r:.80}"
            )
        labels[name] = label
    return labels


def check_videos(files: Sequence[Path]) -> None:
    """Raise ValueError, naming the first file that does not exist."""
    for file in files:
        # Path.is_file raises for a name that is too long.
        if os.path.isfile(file):
            continue
        problem = f"no such video: {file}"
        if any(character < " " for character in str(file)):
            problem = f"no such video: {str(file)!r}; {_BACKSLASHES}"
        elif "\\" in str(file):
            problem += f"; {_BACKSLASHES}"
        raise ValueError(problem)


def prompt_in(row: Mapping[str, str]) -> str:
    """The prompt of a row. Raises ValueError if it is empty."""
    prompt = row["prompt"].strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _text(cell: str | None) -> str:
    return "" if is_empty(cell) else cell
