"""launch/pairs.py: sets from prompts and from files, on one rank and two, killed and resumed."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from alignment.pair_store import PairSet
from alignment.rewards.brightness import Brightness
from common.config import ConfigError, load
from common.distributed import derive_seed
from common.video_io import write_mp4
from engine.guard import locked_folder
from launch import pairs
from launch.compose import build_generator
from launch.schemas.pairs import DpoRun, PairsRun
from launch.training.pair_making import encode_pair
from rm.data import Pair
from rm.video_check import VideoChecker
from tests.fakes import decoder_with_a_trap
from tests.launch.processes import ROOT, deepspeed, run

SCRIPT = str(ROOT / "launch" / "pairs.py")
PROMPTS = ["a red circle", "a blue square", "two cats", "rain", "snow"]
GENERATOR = {
    **{"height": 16, "width": 16, "num_frames": 9, "fps": 8.0, "dtype": "float32"},
    **{"gradient_checkpointing": False, "decode_batch": 8, "max_sequence_length": 24},
    "lora": {"rank": 4, "alpha": 8.0},
    "sampler": {"num_steps": 3, "stochastic_range": 2, "guidance_scale": 1.0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of three videos each from a random Wan, brightness as the reward."""
    from tests.tiny import build_tiny_wan

    root = tmp_path_factory.mktemp("pairs")
    build_tiny_wan(root / "wan")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    values = {
        "out": str(root / "set"),
        "prompts": str(root / "prompts.txt"),
        "generator": {"path": str(root / "wan"), **GENERATOR},
        "pairs": {"candidates": 3},
        "rewards": {"brightness": {}},
        "per_shard": 2,
    }
    (root / "pairs.yaml").write_text(yaml.safe_dump(values))
    return root / "pairs.yaml"


def counts(text: str) -> dict[str, int]:
    """Read the last line of the output, "5 prompts, 4 pairs, ..."."""
    # the last line names the next command
    *_, line, _ = text.strip().splitlines()
    found = re.findall(r"(\d+) (\w+)(?:,|$)", line)
    return {name: int(number) for number, name in found}


@pytest.fixture(scope="module")
def made(config: Path) -> Path:
    """On one rank, in one go."""
    done = run(sys.executable, SCRIPT, "--config", str(config))
    assert counts(done.stdout) == {
        "prompts": 5,
        "pairs": 5,
        "failed": 0,
        "unjudged": 0,
        "close": 0,
        "disagreed": 0,
    }
    return config.parent / "set"


def digests(folder: Path) -> dict[str, str]:
    """Of everything that training reads."""
    files = [
        folder / "manifest.json",
        folder / "index.jsonl",
        *sorted((folder / "shards").iterdir()),
    ]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.mark.slow
def test_pair_is_the_best_and_the_worst_video(config: Path, made: Path) -> None:
    """By another route: the same seeds, judged here."""
    generator, found = (
        build_generator(load(PairsRun, config).generator),
        PairSet(made, check="sha256"),
    )
    assert [row.prompt for row in found.rows] == PROMPTS
    assert not (made / "candidates").exists()
    for i, prompt in enumerate(PROMPTS):
        seeds = [derive_seed(0, "pairs", i, k) for k in range(3)]
        clean = generator.sample([prompt] * 3, seeds)
        value = (
            Brightness().score(generator.decode(clean), [prompt] * 3, fps=8.0).value_B
        )
        batch = found.read([i])
        assert torch.equal(batch.chosen_NCFHW[0], clean[int(value.argmax())])
        assert torch.equal(batch.rejected_NCFHW[0], clean[int(value.argmin())])
        assert torch.equal(batch.embeddings[prompt], generator.prompts.rows_of(prompt))
        best = seeds[int(value.argmax())]
        worst = seeds[int(value.argmin())]
        assert found.rows[i].source.split()[1:] == [str(best), str(worst)]


@pytest.mark.long
def test_two_ranks_write_equal_bytes_and_a_restart_writes_none(
    config: Path, made: Path
) -> None:
    again = run(sys.executable, SCRIPT, "--config", str(config))
    assert str(made) in again.stdout
    assert "5 pairs" in again.stdout
    want = digests(made)
    done = deepspeed(2, SCRIPT, "--config", str(config), f"out={config.parent / 'two'}")
    assert "5 pairs" in done.stdout
    assert digests(config.parent / "two") == want
    other = run(
        sys.executable,
        SCRIPT,
        "--config",
        str(config),
        "pairs.min_margin=0.25",
        expect=2,
    )
    assert "min_margin" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.long
def test_killed_pairs_run_resumes_to_equal_bytes(config: Path, made: Path) -> None:
    folder = config.parent / "killed"
    words = [sys.executable, SCRIPT, "--config", str(config), f"out={folder}"]
    part = folder / "candidates.rank-0.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as one:
        deadline = time.time() + 120
        while time.time() < deadline and not (
            part.exists() and part.read_text().count("\n") >= 2
        ):
            time.sleep(0.002)
        os.kill(one.pid, signal.SIGKILL)
    assert not (folder / "manifest.json").exists()
    count = part.read_text().count("\n")
    assert 2 <= count < 5
    done = run(*words)
    assert re.search(rf"\b5 .*\b{count} .*done", done.stdout)
    assert digests(folder) == digests(made)


@pytest.mark.slow
def test_pairs_from_a_table_of_files(config: Path) -> None:
    """A tie, a broken video, a short video and two pairs, in a table with DeScore's columns."""
    root = config.parent / "table"
    root.mkdir()
    draw = torch.Generator().manual_seed(0)
    for name, frames in (("a", 9), ("b", 9), ("short", 5)):
        colour = torch.randint(40, 215, (1, 1, 1, 3), generator=draw, dtype=torch.uint8)
        write_mp4(
            root / f"{name}.mp4", colour.expand(frames, 32, 48, 3).contiguous(), 8.0
        )
    (root / "broken.mp4").write_bytes(b"no video at all")
    rows = [
        ("a", "b", "A"),
        ("b", "broken", "A"),
        ("a", "b", "same"),
        ("a", "b", "B"),
        ("short", "a", "B"),
    ]
    with (root / "pairs.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["videos", "prompt", "CoT_A", "CoT_B", "GSB"])
        table.writeheader()
        for one, two, label in rows:
            videos = repr([f"{one}.mp4", f"{two}.mp4"])
            table.writerow(
                {
                    "videos": videos,
                    "prompt": "rain",
                    "CoT_A": "",
                    "CoT_B": "",
                    "GSB": label,
                }
            )
    words = [
        "--config",
        str(config),
        "prompts=null",
        f"table.csv={root / 'pairs.csv'}",
        f"out={root / 'set'}",
    ]
    done = run(sys.executable, SCRIPT, *words)
    assert counts(done.stdout) == {
        "rows": 5,
        "pairs": 2,
        "ties": 1,
        "invalid": 0,
        "bad": 0,
        "failed": 2,
    }
    assert "pairs.csv:3: " in done.stdout
    assert "broken.mp4:" in done.stdout
    assert "pairs.csv:6: " in done.stdout
    assert re.search(r"short\.mp4: 5 .*\b9\b", done.stdout)
    found = PairSet(root / "set")
    batch = found.read([0, 1])
    assert torch.equal(
        batch.chosen_NCFHW[0], batch.rejected_NCFHW[1]
    )  # the label turned the pair round
    assert [row.source for row in found.rows] == ["a.mp4 b.mp4", "b.mp4 a.mp4"]
    assert bool(found.values().isnan().all())
    generator = build_generator(load(PairsRun, config).generator)
    colour = generator.decode(batch.chosen_NCFHW[:1]).float().mean((0, 1, 2, 3))
    assert colour.shape == (3,)
    assert batch.embeddings.keys() == {"rain"}


def test_file_that_kills_the_decoder_loses_its_row(
    config: Path, tmp_path: Path, monkeypatch
) -> None:
    decoder_with_a_trap(tmp_path, "trap and os.kill(os.getpid(), 11)", monkeypatch)
    for name in ("a", "trap"):
        write_mp4(
            tmp_path / f"{name}.mp4", torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8.0
        )
    generator = build_generator(load(PairsRun, config).generator)
    pair = Pair("rain", tmp_path / "a.mp4", tmp_path / "trap.mp4", "", "", 1, line=7)
    with VideoChecker() as checker:
        make = encode_pair(generator, "pairs.csv", checker)
        assert make(0, replace(pair, video_B=pair.video_A))[1]["files"] == [
            "a.mp4",
            "a.mp4",
        ]
        with pytest.raises(ValueError, match=r"pairs\.csv:7:") as caught:
            make(1, pair)
        assert "trap.mp4" in str(caught.value)
        assert "-11" in str(caught.value)


def test_contradictory_pair_configs_raise() -> None:
    base = ["out=x", "generator.path=x"]
    for overrides, message in (
        ([], "table"),
        (
            ["prompts=x", "table.csv=x", "rewards.brightness.weight=1"],
            "table",
        ),
        (["prompts=x"], "rewards"),
        (
            ["prompts=x", "rewards.brightness.weight=1", "pairs.candidates=1"],
            "pairs.candidates",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load(PairsRun, None, [*base, *overrides])
    dpo = ["run_dir=x", "pairs=x", "generator.path=x"]
    refresh = ["refresh.every=1", "refresh.prompts=x"]
    for overrides, message in (
        (["dpo.sft_weight=1", "dpo.method=rwr"], "sft_weight"),
        (refresh, "rewards"),
        (
            [*refresh, "refresh.rewards.brightness.weight=1", "zero_stage=3"],
            "zero_stage=3",
        ),
        (["dpo.beta=0"], "dpo.beta"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(DpoRun, None, [*dpo, *overrides])


def test_second_pairs_in_a_folder_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = load(PairsRun, ROOT / "configs/shapes/pairs.yaml")
    cfg = replace(cfg, out=str(tmp_path / "set"))
    with locked_folder(tmp_path / "set"), pytest.raises(SystemExit, match="2"):
        pairs.run(cfg, resume="auto")
    assert "still going" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["lock.json"]
