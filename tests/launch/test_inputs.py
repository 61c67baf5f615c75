"""Which files the training commands record, and what they say of prompts and pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment.pair_store import LatentPair, PairSet, write_pairs
from common.config import load
from common.input_record import record_inputs
from generator.config import GeneratorConfig
from launch.compose import say_long_prompts
from launch.schemas.pairs import DpoRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun
from launch.training import dpo_loop
from launch.training.dpo_loop import check_prompts, shared_pairs
from launch.training.inputs import inputs_of
from launch.training.rm_data import read_tables

ROOT = Path(__file__).resolve().parents[2]
WAN = ROOT / "assets" / "shapes" / "wan"
BASE = ["run_dir=x", f"generator.path={WAN}"]


def test_grpo_run_records_prompts_models_and_reward_files() -> None:
    run = load(
        GrpoRun,
        None,
        [
            *BASE,
            "prompts=a.txt",
            "evaluation.prompts=b.txt",
            "rewards.mine.target=toy/oracle.py:ShapesOracle",
            "rewards.descore.checkpoint=runs/final",
        ],
    )
    wanted = {
        "prompts": "a.txt",
        "evaluation.prompts": "b.txt",
        "generator.path": str(WAN),
        "rewards.mine.target": "toy/oracle.py",
        "rewards.descore.checkpoint": "runs/final",
    }
    given = {name: str(path) for name, path in inputs_of(run).items() if path}
    assert given == wanted
    # a file that is not there is none, and a folder has all its files
    record = record_inputs(inputs_of(run))
    assert record["prompts"]["files"] == {}
    assert "transformer/config.json" in record["generator.path"]["files"]


def test_dpo_run_records_its_sets_and_what_new_pairs_need(tmp_path: Path) -> None:
    run = load(
        DpoRun,
        None,
        [
            *BASE,
            "pairs=set",
            "heldout=other",
            "refresh.every=2",
            "refresh.prompts=p.txt",
            "refresh.rewards.descore.checkpoint=runs/final",
        ],
    )
    assert {name: str(path) for name, path in inputs_of(run).items()} == {
        "generator.path": str(WAN),
        "pairs/manifest.json": "set/manifest.json",
        "pairs/index.jsonl": "set/index.jsonl",
        "heldout/manifest.json": "other/manifest.json",
        "heldout/index.jsonl": "other/index.jsonl",
        "refresh.prompts": "p.txt",
        "refresh.rewards.descore.checkpoint": "runs/final",
    }


@pytest.mark.parametrize(
    ("schema", "key"), [(ColdStartRun, "base"), (DualRlRun, "checkpoint")]
)
def test_reward_model_run_records_tables_and_model(
    tmp_path: Path, schema: type, key: str
) -> None:
    """A table that is given by its folder is the file in it, not the videos beside it."""
    (tmp_path / "train").mkdir()
    for name in ("train/pairs.csv", "train/a.mp4", "heldout.csv"):
        (tmp_path / name).touch()
    run = load(
        schema,
        None,
        [
            "run_dir=x",
            f"data.train={tmp_path / 'train'}",
            f"data.heldout={tmp_path / 'heldout.csv'}",
            f"{key}=model",
        ],
    )
    given = {name: str(path) for name, path in inputs_of(run).items() if path}
    assert given == {
        "data.train": str(tmp_path / "train" / "pairs.csv"),
        "data.heldout": str(tmp_path / "heldout.csv"),
        key: "model",
    }


def test_held_out_pairs_that_are_trained_on_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    for name, pairs in (("train", ["ab", "ac"]), ("heldout", ["ba", "cd"])):
        rows = [f"\"['{a}.mp4', '{b}.mp4']\",p,A" for a, b in pairs]
        text = "\n".join(["videos,prompt,GSB", *rows, ""])
        (tmp_path / f"{name}.csv").write_text(text)
    run = load(
        ColdStartRun,
        None,
        [
            "run_dir=x",
            "base=x",
            f"data.train={tmp_path / 'train.csv'}",
            f"data.heldout={tmp_path / 'heldout.csv'}",
            "cold_start.masking.probability=1",
        ],
    )
    read_tables(run, require_cot=False)
    assert "1 of 2 held-out pairs and 3 of 4 held-out videos" in capsys.readouterr().out


def test_prompts_that_the_text_encoder_cuts_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These have 6, 7 and 10 tokens, by the tokenizer of the tiny Wan."""
    cfg = load(GeneratorConfig, None, [f"path={WAN}", "max_sequence_length=6"])
    prompts = ["a ball", "a red circle moves left", "a red circle moves left up"]
    say_long_prompts(prompts[:1], cfg)
    assert capsys.readouterr().out == ""
    say_long_prompts(prompts, cfg)
    said = capsys.readouterr().out
    assert "2 of 3 prompts have more than the 6 tokens" in said
    assert "max_sequence_length" in said
    assert f"has 7: {prompts[1]!r}" in said
    # only one rank counts
    monkeypatch.setenv("RANK", "1")
    say_long_prompts(prompts, cfg)
    assert capsys.readouterr().out == ""


def test_pairs_in_both_sets_are_found_by_prompt_and_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = torch.zeros(1, 1, 2, 2)

    def write(name: str, *pairs: tuple[str, str]) -> PairSet:
        made = []
        for prompt, source in pairs:
            embedding = torch.zeros(3, 4)
            made.append(LatentPair(prompt, latent, latent, embedding, source=source))
        folder = tmp_path / name
        write_pairs(folder, iter(made), per_shard=2, dtype=torch.float32, about={})
        return PairSet(folder)

    train = write("train", ("a", "1 2"), ("a", "3 4"), ("b", ""))
    heldout = write("heldout", ("a", "3 4"), ("c", "1 2"), ("b", ""))
    assert shared_pairs(train, heldout) == {("a", "3 4")}
    # each prompt once, with those of pairs to come
    (tmp_path / "p.txt").write_text("d\n")
    words = ["pairs=x", "refresh.every=1", f"refresh.prompts={tmp_path / 'p.txt'}"]
    run = load(DpoRun, None, [*BASE, *words, "refresh.rewards.brightness.weight=1"])
    counted = []
    for name in ("say_long_texts", "say_long_prompts"):
        monkeypatch.setattr(dpo_loop, name, lambda texts, _: counted.append(texts))
    check_prompts(run, train)
    assert counted == [["a", "b"], ["d"]]
