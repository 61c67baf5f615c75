"""Preference pairs from the official CSV, and which of them a step sees. A pure function of seed and step."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.schedule import IndexSchedule
from rm.prompt import DIMENSIONS, parse_scores

LABELS = {"A": 1, "B": -1, "same": 0}
REQUIRED_COLUMNS = ("videos", "prompt", "GSB")
_MISSING = {"", "nan", "none", "null"}  # what a table program writes for an empty cell
_MAX_FIELD = 1 << 24


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt and what people preferred.

    video_A, video_B    files; cot_A, cot_B  "" if there is none; label  1 A is better, -1 B is better, 0 a tie
    scores_A, scores_B  the right sub-dimension scores, what stage 2 rewards chains of thought for; None if unknown
    labels              of other dimensions, by name, as far as somebody said
    line                of the CSV, 0 where it came from none
    """

    prompt: str
    video_A: Path
    video_B: Path
    cot_A: str
    cot_B: str
    label: int
    scores_A: Mapping[str, int | None] | None = None
    scores_B: Mapping[str, int | None] | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    line: int = 0

    def __post_init__(self) -> None:
        for label in (self.label, *self.labels.values()):
            if label not in (1, -1, 0):
                raise ValueError(f"Pair.label must be 1, -1 or 0, got {label}")

    def label_in(self, dimension: str) -> float:
        """1, -1, 0, or NaN where nobody said.

        The column of that name; else "overall" is ``label``, and a sub-dimension is won by the higher right score.
        """
        if dimension in self.labels:
            return float(self.labels[dimension])
        if dimension == "overall":
            return float(self.label)
        a, b = (
            (scores or {}).get(dimension) for scores in (self.scores_A, self.scores_B)
        )
        return math.nan if a is None or b is None else float((a > b) - (a < b))


@dataclass(frozen=True)
class PairTable:
    """What a CSV holds: the usable pairs in file order, rows labelled invalid (counted), and bad rows (described)."""

    path: Path
    pairs: tuple[Pair, ...]
    invalid: int
    problems: tuple[str, ...]

    def report(self, limit: int = 10) -> str:
        """A few lines for people."""
        ties = sum(pair.label == 0 for pair in self.pairs)
        head = f"{self.path}: {len(self.pairs)} pairs, {ties} of them ties; {self.invalid} labelled invalid"
        lines = [
            f"{head}; {len(self.problems)} bad rows left out",
            *self.problems[:limit],
        ]
        more = len(self.problems) - limit
        return "\n  ".join(lines + ([f"... and {more} more"] if more > 0 else []))


def read_pairs(
    path: str | Path,
    *,
    require_cot: bool = True,
    require_scores: bool = False,
    dimensions: Sequence[str] = (),
) -> PairTable:
    """Read a CSV, or a folder that holds one, with the official columns.

    videos  python literal ``['a.mp4', 'b.mp4']``, relative to the CSV; prompt; GSB  A, B, same or invalid;
    CoT_A, CoT_B  chains of thought. Other columns (problem, durations, ...) are not read: the template renders the
    instruction from ``prompt``.
    answer  text with an ``<answer>`` block: JSON with ``video_1_scores`` and ``video_2_scores`` (the official stage 2)

    require_cot     a row without both CoTs is a bad row; otherwise its CoT is empty, and never the text "nan"
    require_scores  a row without a readable ``answer`` is a bad row; otherwise its right scores are unknown
    dimensions      more labels: columns of these names with A, B or same (anything else: nobody said). "overall" is
                    GSB, and a sub-dimension without a column of its own is read from ``answer``

    Bad rows are left out and described as ``file:line: what``. ValueError, naming the file, when the table itself is
    unreadable, lacks a column, or has no usable row.
    """
    path = csv_file(Path(path))
    columns = [name for name in dimensions if name not in ("overall", *DIMENSIONS)]
    required = [
        *REQUIRED_COLUMNS,
        *(("CoT_A", "CoT_B") if require_cot else ()),
        *(["answer"] * require_scores),
    ]
    required += columns

    def pair_of(row: Mapping[str, str], label: str) -> Pair:
        pair = _pair(row, label, path.parent, require_cot=require_cot)
        pair = replace(pair, labels=labels_in(row, dimensions))
        scores = parse_scores(row.get("answer") or "")
        if scores is None and require_scores:
            wanted = "an <answer> block with video_1_scores and video_2_scores"
            raise ValueError(f"answer must hold {wanted}, got {row['answer']!r:.80}")
        return (
            pair
            if scores is None
            else replace(pair, scores_A=scores[0], scores_B=scores[1])
        )

    return collect(path, required, "GSB", pair_of)


def collect(
    path: Path,
    required: list[str],
    label_column: str,
    pair_of: Callable[[Mapping[str, str], str], Pair],
) -> PairTable:
    """The table that ``pair_of`` makes of each row and its label's text; its ValueError makes the row a bad one.

    Rows labelled invalid are counted. Raises ValueError as `read_pairs`.
    """
    pairs, problems, invalid = [], [], 0
    try:
        for line, row in _rows(path, required):
            label = (row[label_column] or "").strip()
            if label.lower() == "invalid":
                invalid += 1
                continue
            try:
                pairs.append(replace(pair_of(row, label), line=line))
            except ValueError as error:
                problems.append(f"{path}:{line}: {error}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a UTF-8 CSV file ({error})") from error
    if not pairs:
        raise ValueError(
            f"{path}: no usable pair"
            + "".join(f"\n  {problem}" for problem in problems[:10])
        )
    return PairTable(path, tuple(pairs), invalid, tuple(problems))


@dataclass(frozen=True)
class PairDraw:
    """One pair of a step: its row in the table, and the how-manieth time it comes (from 0)."""

    row: int
    epoch: int


class PairSchedule:
    """Step -> pairs, by `common.schedule.IndexSchedule`."""

    def __init__(self, count: int, *, pairs_per_step: int, seed: int) -> None:
        if count < 1 or pairs_per_step < 1:
            raise ValueError(
                f"a schedule needs pairs and pairs_per_step >= 1, got {count} and {pairs_per_step}"
            )
        self.count, self.pairs_per_step = count, pairs_per_step
        self._indices = IndexSchedule(
            count, seed=seed, per_step=pairs_per_step, name="pairs"
        )

    def steps(self, epochs: float) -> int:
        """Steps that see every pair ``epochs`` times, rounded to the nearest, at least 1."""
        return max(1, round(epochs * self.count / self.pairs_per_step))

    def at(self, step: int) -> list[PairDraw]:
        """All ranks' pairs of one step, from 0."""
        first = step * self.pairs_per_step
        return [
            PairDraw(row, (first + i) // self.count)
            for i, row in enumerate(self._indices.at(step))
        ]


def csv_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        return path
    found = sorted(path.glob("*.csv"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"{path}: a data folder holds one CSV file, found {names}; give the file itself"
        )
    return found[0]


def _rows(path: Path, required: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line where the row starts, row)."""
    previous = csv.field_size_limit(
        _MAX_FIELD
    )  # the module's limit is smaller than a long chain of thought
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [
                name for name in required if name not in (reader.fieldnames or ())
            ]
            if missing:
                raise ValueError(
                    f"{path}: lacks the columns {missing}, has {list(reader.fieldnames or ())}"
                )
            line = reader.line_num + 1
            for row in reader:
                yield line, row
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(previous)


def _pair(row: dict[str, str], label: str, root: Path, *, require_cot: bool) -> Pair:
    if label not in LABELS:
        raise ValueError(f"GSB must be A, B, same or invalid, got {label!r}")
    try:
        videos = ast.literal_eval(row["videos"] or "")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"videos must be a list of two paths, got {row['videos']!r:.80}"
        ) from error
    if (
        not isinstance(videos, list | tuple)
        or len(videos) != 2
        or not all(isinstance(v, str) for v in videos)
    ):
        raise ValueError(
            f"videos must be a list of two paths, got {row['videos']!r:.80}"
        )
    files = [root / video for video in videos]
    check_videos(files)
    prompt = prompt_in(row)
    cots = [_text(row.get(name)) for name in ("CoT_A", "CoT_B")]
    if require_cot and not all(cots):
        raise ValueError(f"{'CoT_A' if not cots[0] else 'CoT_B'} is empty")
    return Pair(prompt, files[0], files[1], cots[0], cots[1], LABELS[label])


def label_rows(pairs: Sequence[Pair], dimensions: Iterable[str]) -> list[list[float]]:
    """`Pair.label_in`, a row a pair and a column a dimension."""
    return [[pair.label_in(name) for name in dimensions] for pair in pairs]


def label_of_total(pair: Pair, dimensions: Collection[str]) -> float:
    """What the summed reward is compared with: the preference in the one dimension there is, else the overall one."""
    return pair.label_in(*dimensions) if len(dimensions) == 1 else float(pair.label)


def labels_in(row: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """What the row's columns of these names say, as far as they say something."""
    cells = {name: (row.get(name) or "").strip() for name in names}
    return {name: LABELS[cell] for name, cell in cells.items() if cell in LABELS}


def check_videos(files: Sequence[Path]) -> None:
    """ValueError, naming the first that is not there."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"no such video: {file}")


def prompt_in(row: Mapping[str, str]) -> str:
    """The row's prompt; ValueError if it is empty."""
    prompt = (row["prompt"] or "").strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _text(cell: str | None) -> str:
    return "" if cell is None or cell.strip().lower() in _MISSING else cell
