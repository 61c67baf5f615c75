"""The official CSV, bad rows by file and line, and the schedule of pairs."""

from __future__ import annotations

import csv
import json
import re

import pytest

from rm.benchmarks import read_benchmark
from rm.data import PairSchedule, read_pairs

HEADER = ["videos", "problem", "durations", "prompt", "CoT_A", "CoT_B", "GSB"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "v").mkdir()
    for name in "ab":
        (tmp_path / "v" / f"{name}.mp4").write_bytes(b"")
    return tmp_path


def write(folder, rows, *, header=HEADER, name="pairs.csv"):
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def row(**changes):
    good = {
        "videos": "['v/a.mp4', 'v/b.mp4']",
        "problem": "ignored",
        "durations": "[5, 5]",
        "prompt": " a ball ",
        "CoT_A": "first\nsecond line",
        "CoT_B": "b",
        "GSB": "A",
    }
    return {**good, **changes}


def test_valid_table_reads_all_pairs(folder):
    path = write(folder, [row(), row(GSB="B"), row(GSB="same"), row(GSB="invalid")])
    table = read_pairs(path)
    assert [pair.label for pair in table.pairs] == [1, -1, 0]
    first = table.pairs[0]
    assert (first.prompt, first.cot_A, first.cot_B) == (
        "a ball",
        "first\nsecond line",
        "b",
    )
    assert (
        first.video_A == folder / "v" / "a.mp4"
    )  # relative to the CSV, not to the working directory
    assert (table.invalid, table.problems) == (1, ())
    assert "3 pairs" in table.report()


def test_folder_path_reads_its_csv(folder):
    write(folder, [row()])
    assert read_pairs(folder) == read_pairs(folder / "pairs.csv")
    write(folder, [row()], name="other.csv")
    with pytest.raises(ValueError, match=r"other\.csv"):
        read_pairs(folder)


def test_bad_rows_are_dropped_and_reported_by_line(folder):
    rows = [
        row(),  # lines 2 and 3: its chain has a line break
        row(GSB="better"),  # 4 and 5
        row(videos="['v/a.mp4']", CoT_A="x"),  # 6
        row(videos="[v/a.mp4", CoT_A="x"),  # 7
        row(videos="{[]: 1}", CoT_A="x"),  # 8
        row(videos="['v/a.mp4', 'v/gone.mp4']", CoT_A="x"),  # 9
        row(prompt=" ", CoT_A="x"),  # 10
        row(CoT_A="nan"),  # 11
        row(CoT_A="x", CoT_B=""),  # 12
    ]
    path = write(folder, rows)
    table = read_pairs(path)
    assert len(table.pairs) == 1
    found = [
        problem.removeprefix(f"{path}:").split(": ", 1) for problem in table.problems
    ]
    assert [int(line) for line, _ in found] == [4, 6, 7, 8, 9, 10, 11, 12]
    for (_, message), word in zip(
        found,
        [
            "'better'",
            "two paths",
            "two paths",
            "two paths",
            "gone.mp4",
            "prompt",
            "CoT_A",
            "CoT_B",
        ],
        strict=True,
    ):
        assert word in message
    assert "8 bad" in table.report()
    assert table.report(limit=2).endswith("6 more")


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "None", "null", "  "])
def test_missing_cot_is_empty_text(folder, empty):
    path = write(folder, [row(CoT_A=empty)])
    assert read_pairs(path, require_cot=False).pairs[0].cot_A == ""
    with pytest.raises(ValueError, match=r"pairs\.csv:2: CoT_A"):
        read_pairs(path)


def test_columns_may_be_fewer_without_chains(folder):
    path = write(folder, [row()], header=["videos", "prompt", "GSB"])
    assert read_pairs(path, require_cot=False).pairs[0].cot_B == ""
    with pytest.raises(ValueError, match="'CoT_B'"):
        read_pairs(path)


def test_scores_are_read_when_requested(folder):
    videos = repr(["v/a.mp4", "v/b.mp4"])
    good = (
        '{"gsb_result": "A", "video_1_scores": {"subject": "2", "camera": "N/A"}, '
        '"video_2_scores": {"subject": 0}}'
    )
    half = '{"video_1_scores": {"subject": "2"}}'
    rows = [
        {
            "videos": videos,
            "prompt": "p",
            "GSB": "A",
            "answer": f"so <answer>```json\n{good}\n```</answer>",
        },
        {
            "videos": videos,
            "prompt": "p",
            "GSB": "A",
            "answer": f"<answer>{half}</answer>",
        },
        {"videos": videos, "prompt": "p", "GSB": "B", "answer": ""},
    ]
    path = write(folder, rows, header=["videos", "prompt", "GSB", "answer"])
    table = read_pairs(path, require_cot=False, require_scores=True)
    assert [(pair.scores_A, pair.scores_B) for pair in table.pairs] == [
        ({"subject": 2, "camera": None}, {"subject": 0})
    ]
    assert len(table.problems) == 2
    for problem in table.problems:
        assert problem.partition(": ")[2].startswith("answer ")
    optional = read_pairs(path, require_cot=False)
    assert not optional.problems
    assert [pair.scores_A for pair in optional.pairs if pair.scores_A] == [
        pair.scores_A for pair in table.pairs
    ]


def test_unreadable_table_raises(folder):
    with pytest.raises(ValueError, match="absent"):
        read_pairs(folder / "absent.csv")
    with pytest.raises(ValueError, match="usable"):
        read_pairs(write(folder, []))
    (folder / "latin.csv").write_bytes(
        "videos,prompt,GSB\ncaf\xe9,x,A\n".encode("latin-1")
    )
    with pytest.raises(ValueError, match=r"latin\.csv"):
        read_pairs(folder / "latin.csv", require_cot=False)


def test_cot_beyond_csv_field_limit_is_read(folder):
    path = write(folder, [row(CoT_A="x" * 200_000)])
    before = csv.field_size_limit(1000)
    try:
        assert len(read_pairs(path).pairs[0].cot_A) == 200_000
        assert (
            csv.field_size_limit() == 1000
        )  # a setting of the whole process: left as it was found
    finally:
        csv.field_size_limit(before)


def schedule(**changes):
    return PairSchedule(**{"count": 10, "pairs_per_step": 4, "seed": 3, **changes})


def test_every_pair_once_an_epoch_in_a_new_order():
    drawn = [draw.row for step in range(15) for draw in schedule().at(step)]
    epochs = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_step_depends_on_nothing_but_its_number_and_the_seed():
    walked = schedule()
    for step in range(20):
        walked.at(step)
    assert walked.at(7) == schedule().at(7)
    assert schedule(seed=4).at(7) != schedule().at(7)
    # and the size of a step changes which step a draw is in, not what is drawn
    small = [draw for step in range(20) for draw in schedule(pairs_per_step=2).at(step)]
    large = [draw for step in range(10) for draw in schedule().at(step)]
    assert small == large


def test_steps_of_some_epochs():
    assert schedule().steps(2.0) == 5
    assert schedule().steps(0.01) == 1
    with pytest.raises(ValueError, match="pairs"):
        schedule(count=0)


def test_row_with_unquoted_commas_is_a_bad_row(folder):
    text = "videos,GSB,prompt\n"
    text += "\"['v/a.mp4', 'v/b.mp4']\",A,a red ball, rolling on grass, slowly\n"
    text += "\"['v/a.mp4', 'v/b.mp4']\",A,a cube\n"
    path = folder / "pairs.csv"
    path.write_text(text)
    table = read_pairs(path, require_cot=False)
    assert [pair.prompt for pair in table.pairs] == ["a cube"]
    (problem,) = table.problems
    assert problem.startswith(f"{path}:2: has 5 cells, the header 3")


@pytest.mark.parametrize(
    ("cell", "hint"),
    [
        (r"['v\a.mp4', 'v\b.mp4']", r"'v/*\\x07|x07"),
        (r"['v\c.mp4', 'v\d.mp4']", "with /"),
        (r"['C:\new\a.mp4', 'b']", "with /"),
        (r"['C:\Users\a.mp4', 'b']", "with /"),
        ("['v/" + "x" * 300 + ".mp4', 'v/b.mp4']", "xxx"),
        ("['v/c.mp4', 'v/b.mp4']", r"c\.mp4$"),
    ],
)
def test_path_that_cannot_be_is_a_bad_row_with_a_hint(folder, cell, hint, recwarn):
    path = write(folder, [row(), row(videos=cell, CoT_A="x")])
    (problem,) = read_pairs(path).problems
    assert re.search(hint, problem)
    assert len(recwarn) == 0


def test_answer_keys_may_be_in_upper_case(folder):
    answer = {
        "Video_1_Scores": {"Subject": 2, " STYLE ": "n/a", "style": 1},
        "video_2_scores": {"subject": 0},
    }
    rows = [row(answer=f"<answer>{json.dumps(answer)}</answer>")]
    path = write(folder, rows, header=[*HEADER, "answer"])
    (pair,) = read_pairs(path, require_scores=True).pairs
    assert (pair.scores_A, pair.scores_B) == (
        {"subject": 2, "style": 1},
        {"subject": 0},
    )


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "Overall"], "videogen"),
        (["left_video_path", "right_video_path", "prompt", "vote_type"], "genai"),
        (["video_A", "video_B", "prompt", "answer"], "indomain"),
        (["prompt", "answer"], None),
    ],
)
def test_table_of_another_layout_names_it(folder, columns, layout):
    path = write(folder, [], header=columns)
    with pytest.raises(ValueError, match="GSB") as error:
        read_pairs(path)
    assert ("data.layout" in str(error.value)) == (layout is not None)
    if layout is not None:
        assert f"data.layout={layout}" in str(error.value)


def test_table_without_chains_of_thought_says_what_trains_on_it(folder):
    header = [name for name in HEADER if not name.startswith("CoT")]
    path = write(folder, [], header=header)
    with pytest.raises(ValueError, match=r"masking\.probability=1 trains"):
        read_pairs(path)


def test_descore_table_read_as_another_layout_names_its_own(folder):
    path = write(folder, [row()])
    with pytest.raises(ValueError, match=r"data\.layout=descore"):
        read_benchmark(path, "videogen")
