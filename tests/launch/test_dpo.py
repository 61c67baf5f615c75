"""launch/dpo.py as a user calls it, on pairs of a random tiny Wan."""

from __future__ import annotations

import gc
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from alignment.dpo import DpoLoop
from alignment.pair_store import LatentPair, PairSet, write_pairs
from common.checkpoint import load_tensors
from common.config import load
from common.distributed import seeded_generator
from common.log import read_metrics
from launch.compose import build_generator
from launch.dpo import misfit
from launch.sample import sample
from launch.schemas.pairs import DpoRun
from launch.schemas.training import SampleRun
from tests.fakes import PlainEngine
from tests.launch.processes import ROOT, ZERO_3, deepspeed, run
from tests.launch.test_pairs import GENERATOR

SCRIPT = str(ROOT / "launch" / "dpo.py")


def test_misfit_names_the_differing_settings(tmp_path: Path) -> None:
    cfg = load(
        DpoRun,
        None,
        ["generator.path=x", "generator.height=16", "run_dir=x", "pairs=x"],
    ).generator
    pair = LatentPair(
        "p", torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.zeros(1, 2)
    )
    for about, want in [
        ({}, ""),  # a set without settings, as earlier versions wrote it
        (
            {
                "identity": {
                    "settings": {"generator": {"height": 16, "width": 832, "path": "y"}}
                }
            },
            "",
        ),
        (
            {"identity": {"settings": {"generator": {"height": 32, "num_frames": 5}}}},
            "height 32 -> 16, num_frames 5 -> 81",
        ),
    ]:
        write_pairs(
            tmp_path, iter([pair]), per_shard=1, dtype=torch.float32, about=about
        )
        found = misfit(PairSet(tmp_path), cfg)
        assert bool(found) == bool(want)
        assert found.endswith(want)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten random pairs, four a step, three steps."""
    from tests.tiny import build_tiny_wan

    root = tmp_path_factory.mktemp("dpo")
    build_tiny_wan(root / "wan")
    generator = build_generator(
        load(
            DpoRun, None, [f"generator.path={root / 'wan'}", "run_dir=x", "pairs=x"]
        ).generator
    )

    def made(name: str, count: int):
        for i in range(count):
            chosen, rejected = torch.randn(
                (2, 16, 3, 2, 2), generator=seeded_generator(name, i)
            )
            prompt = ["a red circle", "rain"][i % 2]
            yield LatentPair(
                prompt,
                chosen,
                rejected,
                generator.prompts.rows_of(prompt),
                float(i),
                -float(i),
            )

    for name, count in (("pairs", 10), ("heldout", 5)):
        write_pairs(
            root / name, made(name, count), per_shard=4, dtype=torch.float32, about={}
        )
    values = {
        "run_dir": str(root / "run"),
        "pairs": str(root / "pairs"),
        "heldout": str(root / "heldout"),
        "generator": {"path": str(root / "wan"), **GENERATOR},
        "dpo": {"pairs_per_step": 4, "micro_batch": 2, "epochs": 1.3, "beta": 50.0},
        "optimizer": {"lr": 1e-3},
        "save_every": 1,
        "keep": 3,
        "heldout_pairs": 5,
    }
    (root / "dpo.yaml").write_text(yaml.safe_dump(values))
    return root / "dpo.yaml"


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """Three steps in one go on two ranks, with an average."""
    folder = config.parent / "whole"
    deepspeed(2, SCRIPT, "--config", str(config), f"run_dir={folder}", "ema.decay=0.5")
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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_and_zero_3_match_two_ranks(
    config: Path, whole: Path, ranks: int
) -> None:
    folder = config.parent / f"other-{ranks}"
    words = [SCRIPT, "--config", str(config), f"run_dir={folder}"]
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


@pytest.mark.slow
def test_resumed_dpo_run_equals_an_uninterrupted_run(config: Path, whole: Path) -> None:
    folder = config.parent / "resumed"
    shutil.copytree(whole, folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")
    for name in ("final", "final_ema"):
        shutil.rmtree(folder / name)
    done = deepspeed(
        2, SCRIPT, "--config", str(config), f"run_dir={folder}", "ema.decay=0.5"
    )
    assert "after 1 " in done.stdout
    assert numbers(folder) == numbers(whole)
    for part in ("final", "final_ema"):
        ours, theirs = adapter_of(folder, part), adapter_of(whole, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


@pytest.mark.slow
def test_sample_loads_the_dpo_adapter(config: Path, whole: Path) -> None:
    (config.parent / "prompts.txt").write_text("rain\n")
    cfg = load(DpoRun, config)
    out = config.parent / "videos"
    sample(
        SampleRun(
            str(out),
            str(config.parent / "prompts.txt"),
            cfg.generator,
            adapter=str(whole / "final"),
        )
    )
    assert (out / "0000.mp4").stat().st_size > 0


@pytest.mark.slow
def test_dpo_loads_neither_vae_nor_text_encoder(config: Path) -> None:
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
    cfg = load(DpoRun, config)
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


@pytest.mark.slow
def test_refresh_replaces_pairs_and_resumes_equal(config: Path) -> None:
    """New pairs every two steps; a run that stopped at step 3 makes the same round again."""
    (config.parent / "prompts.txt").write_text("rain\nsnow\nfog\n")
    folder = config.parent / "online"
    words = [
        "--config",
        str(config),
        f"run_dir={folder}",
        "dpo.epochs=2",
        "heldout=null",
    ]
    words += [
        "refresh.every=2",
        f"refresh.prompts={config.parent / 'prompts.txt'}",
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


@pytest.mark.slow
def test_wrong_dpo_config_exits_2_without_traceback(config: Path) -> None:
    words = [sys.executable, SCRIPT, "--config", str(config)]
    for overrides, message in (
        (["pairs=nowhere"], "nowhere"),
        (["dpo.micro_batch=3"], "dpo.micro_batch=3"),
    ):
        done = run(*words, *overrides, expect=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
