"""Published benchmark tables, row by row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rm.benchmarks import read_benchmark
from rm.prompt import preference_word


def write(folder: Path, header: list[str], *rows: list[str]) -> Path:
    (folder / "v").mkdir()
    for name in ("a", "b"):
        (folder / "v" / f"{name}.mp4").touch()
    with (folder / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "bench.csv"


def test_videogen_rewardbench_has_a_label_per_dimension(tmp_path: Path) -> None:
    header = [
        "path_A",
        "path_B",
        "A_model",
        "B_model",
        "prompt",
        "VQ",
        "MQ",
        "TA",
        "Overall",
        "fps_A",
    ]
    path = write(
        tmp_path,
        header,
        ["v/a.mp4", "v/b.mp4", "m", "n", "a ball", "A", "B", "same", "A", "24"],
        ["v/b.mp4", "v/a.mp4", "m", "n", "a cat", "B", "B", "A", "same", "24"],
        ["v/a.mp4", "v/gone.mp4", "m", "n", "a cat", "A", "A", "A", "A", "24"],
        ["v/a.mp4", "v/b.mp4", "m", "n", "a cat", "A", "A", "C", "A", "24"],
    )
    want = {"VQ": [1, -1], "MQ": [-1, -1], "TA": [0, 1]}
    for dimension, labels in want.items():
        table = read_benchmark(path, "videogen", dimension=dimension)
        assert [pair.label for pair in table.pairs][:2] == labels
    table = read_benchmark(path, "videogen")
    assert table.pairs[1].video_A == tmp_path / "v" / "b.mp4"
    assert [problem.partition(": ")[0] for problem in table.problems] == [
        f"{path}:4",
        f"{path}:5",
    ]
    assert "'C'" in table.problems[1]
    with pytest.raises(ValueError, match="speed"):
        read_benchmark(path, "videogen", dimension="speed")


def test_genai_bench_votes(tmp_path: Path) -> None:
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "?"]
    rows = [["a.mp4", "b.mp4", f"p{i}", vote] for i, vote in enumerate(votes)]
    path = write(
        tmp_path, ["left_video_path", "right_video_path", "prompt", "vote_type"], *rows
    )
    table = read_benchmark(path, "genai", videos=tmp_path / "v")
    assert [pair.label for pair in table.pairs] == [1, -1, 0, 0]
    assert len(table.problems) == 1
    with pytest.raises(ValueError, match="bench"):
        read_benchmark(path, "genai")  # the videos are elsewhere


def test_in_domain_table_has_labels(tmp_path: Path) -> None:
    said = ["Video 1 is better", "B", "The same", "Video 2 is better"]
    answers = [f'<answer>{{"gsb_result": "{word}"}}</answer>' for word in said] + [
        "nothing",
        "invalid",
    ]
    rows = [["v/a.mp4", "v/b.mp4", "p", answer] for answer in answers]
    table = read_benchmark(
        write(tmp_path, ["video_A", "video_B", "prompt", "answer"], *rows), "indomain"
    )
    assert [pair.label for pair in table.pairs] == [1, -1, 0, -1]
    assert (table.invalid, len(table.problems)) == (1, 1)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path, ["path_A", "path_B", "prompt", "VQ"], ["v/a.mp4", "v/b.mp4", "p", "A"]
    )
    with pytest.raises(ValueError, match="'TA'"):
        read_benchmark(path, "videogen")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("<answer>[1]</answer>", ""),
        ('<answer>{"gsb_result": 3}</answer>', ""),
        ('<answer>{"GSB_Result": "A"}</answer>', "A"),
        ("", ""),
    ],
)
def test_preference_word(text: str, word: str) -> None:
    assert preference_word(text) == word
