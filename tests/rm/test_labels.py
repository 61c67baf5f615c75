"""One table of words for a label, whatever the layout of the table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rm.benchmarks import read_benchmark
from rm.data import PairTable, read_pairs
from rm.labels import is_invalid, read_label

# spellings that people use, one a line where they hold blanks
A = """A|a| A |A.|Video 1|video 1 is better|Video 1 is better.|Video A is better|leftvote
Left Vote|left|model_a|first"""
B = """B|b|b.|Video 2|VIDEO  2 IS BETTER|video_b|rightvote|Right|model-b|second video"""
TIE = """same|Same|SAME|the same|tie|Tie.|draw|equal|tievote|bothbad_vote|Both are equal
both good"""
NONE = "C|?|1|2|-1|0|G|better|A/B|not a|A B|=|-"
SPELLINGS = {1: A, -1: B, 0: TIE, None: NONE}
CASES = []
for number, texts in SPELLINGS.items():
    CASES += [(text, number) for text in texts.replace("\n", "|").split("|")]
# columns of each layout, of which the label comes last
LAYOUTS = {
    "descore": ["videos", "prompt", "GSB"],
    "videogen": ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "Overall"],
    "genai": ["left_video_path", "right_video_path", "prompt", "vote_type"],
    "indomain": ["video_A", "video_B", "prompt", "answer"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, columns: list[str], *rows: list[str]) -> Path:
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "table.csv"


@pytest.mark.parametrize(("text", "label"), CASES)
def test_read_label(text: str, label: int | None) -> None:
    assert read_label(text) == label


@pytest.mark.parametrize("text", ["invalid", " Invalid", "INVALID."])
def test_invalid_is_no_label(text: str) -> None:
    assert is_invalid(text)
    assert read_label(text) is None


def table_of(folder: Path, layout: str, *labels: str) -> PairTable:
    """Read a table of a layout with a row for each label, and another prompt in each."""
    columns = LAYOUTS[layout]
    rows = []
    for number, label in enumerate(labels):
        videos = ["['a.mp4', 'b.mp4']"] if layout == "descore" else ["a.mp4", "b.mp4"]
        cell = label
        if layout == "indomain":
            cell = f'<answer>{{"gsb_result": "{label}"}}</answer>'
        row = [*videos, f"p{number}"]
        row += ["A"] * (len(columns) - len(row) - 1)
        rows.append([*row, cell])
    path = write(folder, columns, *rows)
    return read_benchmark(path, layout, dimension="Overall")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same_words(folder: Path, layout: str) -> None:
    words = ("Video 1 is better.", "b", "Tie", "better", "1", "invalid")
    table = table_of(folder, layout, *words)
    assert [pair.label for pair in table.pairs] == [1, -1, 0]
    assert [problem.split(":")[1] for problem in table.problems] == ["5", "6"]
    assert "'better'" in table.problems[0] or '"better"' in table.problems[0]


def test_further_dimensions_read_the_same_words(folder: Path) -> None:
    """Only an empty cell is an unknown label; another word is a bad row with its line."""
    videos = "['a.mp4', 'b.mp4']"
    path = write(
        folder,
        ["videos", "prompt", "GSB", "VQ", "MQ"],
        [videos, "p1", "A", "a", "tie"],
        [videos, "p2", "A", "A", "Same"],
        [videos, "p3", "A", "Video 2", ""],
        [videos, "p4", "A", "nan", "invalid"],
        [videos, "p5", "A", "A", "unsure"],
    )
    table = read_pairs(path, require_cot=False, dimensions=["VQ", "MQ"])
    assert [dict(pair.labels) for pair in table.pairs] == [
        {"VQ": 1, "MQ": 0},
        {"VQ": 1, "MQ": 0},
        {"VQ": -1},
        {},
    ]
    (problem,) = table.problems
    assert problem.startswith(f"{path}:6: MQ ")
    assert "pairs without a label in VQ: 1" in table.report()
    assert "pairs without a label in MQ: 2" in table.report()
