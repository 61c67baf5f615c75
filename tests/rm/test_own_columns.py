"""Tables with columns of other names."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from common.config import ConfigError, load
from launch.schemas.evaluation import RewardEvaluation
from launch.schemas.pairs import PairsRun
from launch.schemas.training import ColdStartRun
from rm.benchmarks import read_benchmark
from rm.data import read_pairs
from tests.launch.processes import ROOT

COLUMNS = {"prompt": "text", "video_A": "left", "video_B": "right", "GSB": "winner"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two pairs; a column of the table has one of our names and another meaning."""
    for name in ("a.mp4", "b c.mp4"):
        (tmp_path / name).write_bytes(b"")
    path = tmp_path / "survey.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "left", "right", "winner", "videos"])
        writer.writerow(["a ball", "a.mp4", " b c.mp4 ", "Left", "7"])
        writer.writerow(["a cube", tmp_path / "b c.mp4", "a.mp4", "tie", "8"])
        writer.writerow(["a cone", "a.mp4", "no.mp4", "right", "9"])
        writer.writerow(["a row that is too short"])
    return path


def test_own_columns_are_read_as_ours(table: Path) -> None:
    found = read_pairs(table, require_cot=False, columns=COLUMNS)
    folder = table.parent
    assert [pair.label for pair in found.pairs] == [1, 0]
    assert [pair.prompt for pair in found.pairs] == ["a ball", "a cube"]
    first, second = found.pairs
    assert (first.video_A, first.video_B) == (folder / "a.mp4", folder / "b c.mp4")
    assert (second.video_A, second.video_B) == (folder / "b c.mp4", folder / "a.mp4")
    # The bad rows keep their lines.
    assert [problem.split(":")[1] for problem in found.problems] == ["4", "5"]


def test_both_videos_in_a_cell_under_another_name(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    path = tmp_path / "table.csv"
    path.write_text("films,prompt,GSB\n\"['a.mp4', 'b.mp4']\",x,B\n")
    found = read_benchmark(path, "descore", columns={"videos": "films"})
    (pair,) = found.pairs
    assert (pair.video_B.name, pair.label) == ("b.mp4", -1)


def test_column_that_is_not_there_is_named(table: Path) -> None:
    with pytest.raises(ValueError, match=r"survey\.csv: columns names \['best'\]"):
        read_pairs(table, require_cot=False, columns=COLUMNS | {"GSB": "best"})
    with pytest.raises(ValueError, match=r"named by data\.columns"):
        read_pairs(table, require_cot=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.columns={promt: text}"], "columns names promt; it takes videos"),
        (["data.columns={video_A: left}"], "it needs video_A and video_B"),
        (
            ["data.columns={videos: v, video_A: a, video_B: b}"],
            "not both",
        ),
        (["data.columns={prompt: x}", "data.layout=genai"], "columns of its own"),
    ],
)
def test_wrong_columns_are_refused_with_the_config(words: list[str], said: str) -> None:
    path = ROOT / "configs" / "shapes" / "cold_start.yaml"
    with pytest.raises(ConfigError, match=said):
        load(ColdStartRun, path, [*words, "cold_start.masking.probability=1"])


def test_evaluation_and_pairs_take_columns_too() -> None:
    folder = ROOT / "configs" / "shapes"
    word = "columns={prompt: text}"
    found = load(RewardEvaluation, folder / "evaluate_rm.yaml", [word, "pairs=x.csv"])
    assert found.columns == {"prompt": "text"}
    words = ["prompts=null", "table.csv=x.csv", f"table.{word}"]
    made = load(PairsRun, folder / "pairs.yaml", words)
    assert made.table.columns == {"prompt": "text"}
