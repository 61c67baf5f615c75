"""Pairs that are given twice, that contradict each other, and that are in two tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rm.data import Pair, read_pairs
from rm.repeated_pairs import describe_overlap, describe_repeated

ONE = Pair("a ball", Path("v/a.mp4"), Path("v/b.mp4"), "", "", 1, line=2)
SWAPPED = replace(ONE, video_A=ONE.video_B, video_B=ONE.video_A)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (ONE, ["repeat"]),
        (replace(ONE, label=-1), ["repeat", "contradict"]),
        (replace(ONE, label=0), ["repeat", "contradict"]),
        (SWAPPED, ["repeat", "contradict"]),
        (replace(SWAPPED, label=-1), ["repeat"]),
        (replace(ONE, video_A=Path("v/../v/a.mp4")), ["repeat"]),
        (replace(ONE, prompt="a cube", label=-1), []),
        (replace(ONE, video_B=Path("v/c.mp4"), label=-1), []),
    ],
)
def test_second_pair_repeats_or_contradicts(second: Pair, words: list[str]) -> None:
    lines = describe_repeated([ONE, replace(second, line=7)])
    assert all("1 (first in lines 2 and 7)" in line for line in lines)
    for line, word in zip(lines, words, strict=True):
        assert word in line


def test_symbolic_link_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    first = replace(ONE, video_A=tmp_path / "a.mp4")
    second = replace(ONE, video_A=tmp_path / "link.mp4")
    assert len(describe_repeated([first, second])) == 1


def test_overlap_counts_pairs_and_videos() -> None:
    other = replace(ONE, video_A=Path("v/c.mp4"), video_B=Path("v/d.mp4"))
    shares_a_film = replace(other, video_A=ONE.video_A, line=9)
    assert describe_overlap([ONE], [other]) == ""
    assert describe_overlap([ONE], []) == ""
    text = describe_overlap([ONE], [other, replace(SWAPPED, line=5)])
    assert "1 of 2 held-out pairs" in text
    assert "2 of 4 held-out videos" in text
    assert "line 5" in text
    text = describe_overlap([ONE], [other, shares_a_film])
    assert "0 of 2 held-out pairs" in text
    assert "1 of 3 held-out videos" in text
    assert "a.mp4" in text


def test_report_of_a_table_has_its_repetitions(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    rows = ["videos,prompt,GSB"]
    for pair, label in (("ab", "A"), ("ab", "B"), ("ba", "A"), ("aa", "A")):
        rows.append(f"\"['{pair[0]}.mp4', '{pair[1]}.mp4']\",p,{label}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    table = read_pairs(tmp_path / "t.csv", require_cot=False)
    assert len(table.pairs) == 3
    (problem,) = table.problems
    assert ":5: " in problem
    assert "same file" in problem
    assert "an earlier row: 2 (first in lines 2 and 3)" in table.report()
    assert "each other: 1 (first in lines 2 and 3)" in table.report()
