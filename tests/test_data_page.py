"""docs/data.md: the real readers read the files that the page shows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.pair_store import LatentPair, PairRow, write_pairs
from alignment.prompts import read_prompts
from common.files import read_jsonl
from common.log import read_metrics
from common.types import Score
from generator import adapter_file
from launch.evaluation.files import find_items
from launch.evaluation.results_table import score_fields
from rm.benchmarks import read_benchmark
from rm.config import Generation, RewardDimension
from rm.data import Pair, read_pairs
from rm.model import DeScore
from rm.video_check import split_pairs

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```text\n(.*?)```", PAGE, re.S))
FILES = {
    name: body.strip("\n") + "\n"
    for name, body in re.findall(r"== (\S+)\n(.*?)(?=\n== |\Z)", BLOCKS, re.S)
}
WRITTEN = (
    "metrics.jsonl",
    "samples.jsonl",
    "bad_samples.jsonl",
    "results.jsonl",
    "scores.jsonl",
    "index.jsonl",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every file of the page, and the videos that its tables name."""
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "clips" / name).touch()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_tables_of_pairs(folder: Path) -> None:
    table = read_pairs(folder / "pairs.csv", require_scores=True)
    assert table.problems == ()
    (pair,) = table.pairs
    assert (pair.prompt, pair.label, pair.cot_A, pair.cot_B) == (
        "a red ball rolls",
        1,
        "It is red.",
        "It is blue.",
    )
    assert (pair.scores_A, pair.scores_B) == (
        {"subject": 2, "style": None},
        {"subject": 0},
    )
    wanted = {
        ("videogen", "MQ"): 0,
        ("videogen", "TA"): -1,
        ("genai", "TA"): 1,
        ("indomain", "TA"): 1,
    }
    for (layout, dimension), label in wanted.items():
        found = read_benchmark(folder / f"{layout}.csv", layout, dimension=dimension)
        assert found.problems == ()
        assert [(one.prompt, one.label) for one in found.pairs] == [
            ("a red ball rolls", label)
        ]


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("GSB", "better", "'better'"),
        (
            "videos",
            "clips/a.mp4",
            "'clips/a.mp4'",
        ),
        ("videos", "['clips/a.mp4', 'clips/c.mp4']", "c.mp4"),
        ("prompt", " ", "prompt"),
        ("CoT_A", "nan", "CoT_A"),
        (
            "answer",
            "?",
            "video_1_scores",
        ),
    ],
)
def test_bad_row_is_reported_with_its_line(
    folder: Path, column: str, cell: str, message: str
) -> None:
    (row,) = csv.DictReader((folder / "pairs.csv").open(encoding="utf-8", newline=""))
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row, row | {column: cell}])
    table = read_pairs(folder / "pairs.csv", require_scores=True)
    (problem,) = table.problems
    assert problem.startswith(f"{folder / 'pairs.csv'}:3: ")
    assert message in problem
    assert len(table.pairs) == 1


def test_bad_table_is_refused_with_what_is_wrong(folder: Path) -> None:
    (folder / "latin.csv").write_bytes(b"videos,prompt,GSB,CoT_A,CoT_B\n\xff,,,,\n")
    (folder / "short.csv").write_text("videos,prompt\n")
    (folder / "bad.jsonl").write_text('{"text": "a ball"}\n')
    (folder / "worse.jsonl").write_text("a ball\n")
    (folder / "nothing.txt").write_text("\n")
    (folder / "half.csv").write_text("video,prompt\nclips/a.mp4,\n")
    changed = FILES["videogen.csv"].replace("A,same,B,A", "A,same,C,A")
    (folder / "other.csv").write_text(changed)
    for read, file, message in (
        (read_pairs, "latin.csv", "latin.csv"),
        (read_pairs, "short.csv", "GSB"),
        (read_pairs, "clips", "clips"),
        (lambda path: read_benchmark(path, "videogen"), "other.csv", "other.csv"),
        (
            lambda path: read_benchmark(path, "videogen"),
            "other.csv",
            "'C'",
        ),
        (read_prompts, "pairs.csv", ".jsonl"),
        (read_prompts, "nothing.txt", "nothing.txt"),
        (read_prompts, "bad.jsonl", '"prompt"'),
        (read_prompts, "worse.jsonl", "JSON"),
        (
            lambda path: find_items(None, path),
            "pairs.csv",
            "prompt",
        ),
        (
            lambda path: find_items(None, path),
            "half.csv",
            "half.csv:2",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(folder / file)


def test_prompts_and_videos_to_score(folder: Path) -> None:
    assert (
        read_prompts(folder / "prompts.txt")
        == read_prompts(folder / "prompts.jsonl")
        == ["a red ball rolls"]
    )
    for name, video in (
        ("clips.csv", "clips/a.mp4"),
        ("samples.jsonl", "0000.mp4"),
        ("results.jsonl", "videos/0000.mp4"),
    ):
        (item,) = find_items(None, folder / name)
        assert item.path == folder / video


def test_lines_that_are_written_are_read_and_have_the_writers_keys(
    folder: Path,
) -> None:
    for name in WRITTEN:
        for row in read_jsonl(folder / name):
            json.dumps(row, allow_nan=False)
    assert read_metrics(folder / "metrics.jsonl")[0]["reward/mine"] == 0.5
    scores = {"mine": Score(torch.tensor([0.5]))}
    for name in ("samples.jsonl", "results.jsonl", "scores.jsonl"):
        assert read_jsonl(folder / name)[0].keys() >= score_fields(scores, 0).keys()
    pair = Pair(
        "a red ball rolls", Path("clips/a.mp4"), Path("clips/b.mp4"), "", "", 1, line=7
    )
    (record,) = split_pairs([pair], {pair.video_B: "0 bytes"})[1]
    assert read_jsonl(folder / "bad_samples.jsonl") == [{"of": "pairs", **record}]


def test_pairs_of_latents(folder: Path) -> None:
    latent, embedding = torch.zeros(2, 1, 2, 2), torch.zeros(3, 4)
    made = LatentPair(
        "a red ball rolls", latent, latent, embedding, 1.38, -1.45, "seeds 81 21"
    )
    write_pairs(
        folder / "set", iter([made]), per_shard=1, dtype=torch.float32, about={}
    )
    assert (folder / "set" / "index.jsonl").read_text() == FILES["index.jsonl"]
    line = json.loads(FILES["index.jsonl"])
    assert PairRow(**line).as_json() == line


def test_settings_of_weights(folder: Path) -> None:
    name = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    sides = {
        name: torch.zeros(2, 4),
        name.replace("lora_A", "lora_B"): torch.zeros(4, 2),
    }
    save_file(
        sides,
        folder / adapter_file.ADAPTER_FILE,
        {"lora_adapter_metadata": FILES["lora_adapter_metadata"]},
    )
    assert adapter_file.read(folder).scales.scaling_of("blocks.0.attn1.to_q") == 2.0
    assert f"`{name}`" in PAGE
    record = json.loads(FILES["descore.json"])
    assert DeScore.dimensions_in(folder) == ["overall"]
    assert Generation(**record["generation"]) == Generation()
    assert {k: RewardDimension(**v) for k, v in record["dimensions"].items()} == {
        "overall": RewardDimension()
    }


def test_data_page_covers_all_formats() -> None:
    assert len(FILES) == 15
    assert set(WRITTEN) < set(FILES)
