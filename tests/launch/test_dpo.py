"""launch/dpo.py as a user calls it, on pairs of a random tiny Wan."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from alignment.config import DpoConfig
from alignment.dpo import DpoLoop
from alignment.pair_store import LatentPair, PairSet, write_pairs
from common.checkpoint import load_tensors
from common.config import load
from common.log import read_metrics
from launch.compose import build_generator
from launch.sample import sample
from launch.schemas.pairs import DpoRun
from launch.schemas.training import SampleRun
from launch.training.dpo_displacement import DisplacementWatch
from launch.training.dpo_loop import read_set
from tests.fakes import PlainEngine
from tests.launch.processes import ROOT, ZERO_3, deepspeed, run

SCRIPT = str(ROOT / "launch" / "dpo.py")


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        (None, ""),  # a set without settings, as earlier versions wrote it
        ({"height": 16, "width": 832, "path": "y"}, ""),
        ({"height": 32, "num_frames": 5}, "height 32 -> 16, num_frames 5 -> 81"),
    ],
)
def test_pairs_of_another_size_name_the_differing_settings(
    tmp_path: Path, recorded: dict | None, problem: str
) -> None:
    overrides = ["generator.path=x", "generator.height=16", "run_dir=x", "pairs=x"]
    cfg = load(DpoRun, None, overrides).generator
    latent = torch.zeros(1, 1, 1, 1)
    pair = LatentPair("p", latent, latent + 1, torch.zeros(1, 2))
    about = {}
    if recorded is not None:
        about = {"identity": {"settings": {"generator": recorded}}}
    write_pairs(tmp_path, iter([pair]), per_shard=1, dtype=torch.float32, about=about)
    if not problem:
        assert len(read_set(str(tmp_path), cfg)) == 1
        return
    with pytest.raises(ValueError, match=problem):
        read_set(str(tmp_path), cfg)


def test_displacement_is_a_positive_mean_over_the_window(tmp_path: Path) -> None:
    def stops(watch: DisplacementWatch, *changes: float) -> list[bool]:
        rows = [{"train/chosen_change": change} for change in changes]
        return [watch.should_stop(step, row) for step, row in enumerate(rows)]

    cfg = DpoConfig(displacement_window=3, stop_on_displacement=True)
    watch = DisplacementWatch(cfg)
    # too early twice, then 0.5, -1.5 and NaN over three steps
    assert stops(watch, -1.0, 2.0) == [False, False]
    assert stops(watch, -0.5, -2.0, math.nan) == [True, False, False]
    # the same after a resume: -2, NaN and a new value
    (tmp_path / "state.json").write_text(json.dumps(watch.state()))
    resumed = DisplacementWatch(cfg)
    resumed.restore(tmp_path)
    assert stops(resumed, 9.0, 9.0, 9.0) == [False, False, True]
    # a method without a reference has no changes
    assert not watch.should_stop(0, {"train/loss": 1.0})


@pytest.fixture(scope="module")
def whole(dpo_config: Path) -> Path:
    """Three steps in one go on two ranks, with an average."""
    folder = dpo_config.parent / "whole"
    deepspeed(
        2, SCRIPT, "--config", str(dpo_config), f"run_dir={folder}", "ema.decay=0.5"
    )
    return folder


def numbers(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds/", "memory/"))}
        for row in rows
    ]


def adapter_of(folder: Path, part: str = "final") -> dict[str, torch.Tensor]:
    return load_tensors(folder / part / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_dpo_metrics_of_three_steps(whole: Path) -> None:
    rows = numbers(whole)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["train/accuracy"] == 0.5
    assert rows[0]["train/chosen_change"] == 0.0
    assert rows[2]["train/chosen_change"] != 0.0
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert any(key.startswith("train/loss_sigma_") for key in rows[0])
    # both videos of 4 pairs, with gradient and for the reference; held-out pairs are not counted
    assert all(row["forwards/grad"] == row["forwards/no_grad"] == 8 for row in rows)
    assert all(
        row["memory/peak_gb"] > 0.1 for row in read_metrics(whole / "metrics.jsonl")
    )
    assert 0 <= rows[2]["heldout/accuracy"] <= 1
    assert "heldout/loss" not in rows[1]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_and_zero_3_match_two_ranks(
    dpo_config: Path, whole: Path, ranks: int
) -> None:
    folder = dpo_config.parent / f"other-{ranks}"
    # the average is evaluated, so the other run averages too
    words = [SCRIPT, "--config", str(dpo_config), f"run_dir={folder}", "ema.decay=0.5"]
    run(sys.executable, *words, "zero_stage=0") if ranks == 1 else deepspeed(
        2, *words, *ZERO_3
    )
    for one, two in zip(numbers(folder), numbers(whole), strict=True):
        for key in two.keys() - {"train/grad_norm"}:
            # ZeRO 3 sums gradients in another order, which Adam magnifies
            assert one[key] == pytest.approx(
                two[key], abs=1e-5, rel=1e-5 if ranks == 1 else 1e-4
            ), key
    for name, weight in adapter_of(folder).items():
        assert float((weight - adapter_of(whole)[name]).abs().max()) < 2e-5, name


@pytest.mark.long
def test_resumed_dpo_run_equals_an_uninterrupted_run(
    dpo_config: Path, whole: Path
) -> None:
    folder = dpo_config.parent / "resumed"
    shutil.copytree(whole, folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")
    for name in ("final", "final_ema"):
        shutil.rmtree(folder / name)
    done = deepspeed(
        2, SCRIPT, "--config", str(dpo_config), f"run_dir={folder}", "ema.decay=0.5"
    )
    assert "after 1 " in done.stdout
    assert numbers(folder) == numbers(whole)
    for part in ("final", "final_ema"):
        ours, theirs = adapter_of(folder, part), adapter_of(whole, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


@pytest.mark.slow
def test_sample_loads_the_dpo_adapter(dpo_config: Path, whole: Path) -> None:
    (dpo_config.parent / "prompts.txt").write_text("rain\n")
    cfg = load(DpoRun, dpo_config)
    out = dpo_config.parent / "videos"
    sample(
        SampleRun(
            str(out),
            str(dpo_config.parent / "prompts.txt"),
            cfg.generator,
            adapter=str(whole / "final"),
        )
    )
    assert (out / "0000.mp4").stat().st_size > 0


@pytest.mark.slow
def test_dpo_loads_neither_vae_nor_text_encoder(dpo_config: Path) -> None:
    """Looked for among all live objects, before and after a step."""
    from diffusers import AutoencoderKLWan
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

    def alive() -> list[str]:
        gc.collect()
        kinds = (AutoencoderKLWan, UMT5EncoderModel, PreTrainedTokenizerBase)
        return [
            type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds)
        ]

    before = len(alive())
    cfg = load(DpoRun, dpo_config)
    generator = build_generator(cfg.generator, transformer_only=True)
    engine = PlainEngine(generator.module, accumulation=2)
    loop = DpoLoop(
        cfg.dpo, generator=generator, engine=engine, pairs=PairSet(cfg.pairs), seed=0
    )
    loop.step(0)
    assert len(alive()) <= before
    assert generator._pipeline.vae is None
    assert generator._pipeline.text_encoder is None
    assert len(generator.prompts) == 0  # and embeddings of pairs do not pile up
    with pytest.raises(RuntimeError, match="VAE"):
        generator.sample(["rain"], [1])


@pytest.mark.long
def test_refresh_replaces_pairs_and_resumes_equal(dpo_config: Path) -> None:
    """New pairs every two steps; a run that stopped at step 3 makes the same round again."""
    (dpo_config.parent / "prompts.txt").write_text("rain\nsnow\nfog\n")
    folder = dpo_config.parent / "online"
    words = [
        "--config",
        str(dpo_config),
        f"run_dir={folder}",
        "dpo.epochs=2",
        "heldout=null",
    ]
    words += [
        "refresh.every=2",
        f"refresh.prompts={dpo_config.parent / 'prompts.txt'}",
        "refresh.limit=2",
    ]
    words += ["refresh.rewards.brightness.weight=1", "refresh.pairs.candidates=2"]
    run(sys.executable, SCRIPT, *words)
    rounds = sorted(path.name for path in (folder / "pairs").iterdir())
    assert rounds == ["round-0001", "round-0002"]
    assert [len(PairSet(folder / "pairs" / name)) for name in rounds] == [2, 2]
    want = numbers(folder)
    first, second = (
        PairSet(folder / "pairs" / name).read([0, 1]).chosen_NCFHW for name in rounds
    )
    assert not torch.equal(first, second)
    for step in (4, 5):
        shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")
    shutil.rmtree(folder / "pairs" / "round-0002")
    run(sys.executable, SCRIPT, *words)
    assert numbers(folder) == want


@pytest.mark.long
def test_wrong_dpo_config_exits_2_without_traceback(dpo_config: Path) -> None:
    words = [sys.executable, SCRIPT, "--config", str(dpo_config)]
    for overrides, message in (
        (["pairs=nowhere"], "nowhere"),
        (["dpo.micro_batch=3"], "dpo.micro_batch=3"),
    ):
        done = run(*words, *overrides, expect=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
