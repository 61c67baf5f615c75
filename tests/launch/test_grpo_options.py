"""Optional features of a GRPO run: evaluation, average, cached prompts, full fine-tuning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from alignment.grpo import GrpoLoop
from alignment.prompts import PromptSchedule, read_prompts
from alignment.rewards.brightness import Brightness
from common.checkpoint import load_tensors
from common.config import load
from common.distributed import derive_seed
from launch.compose import build_generator
from launch.sample import sample
from launch.schemas.training import GrpoRun, SampleRun
from launch.training.grpo_loop import cache_prompts
from tests.fakes import PlainEngine
from tests.launch.processes import ROOT, ZERO_3, run
from tests.launch.test_grpo import adapter_of, alone, numbers, on_two_ranks


@pytest.mark.long
def test_heldout_evaluation_ema_and_cached_prompts_under_zero_3(tiny: Path) -> None:
    """Three held-out prompts on two ranks; stopped after the first step and resumed."""
    (tiny.parent / "heldout.txt").write_text("a dog\na green star\nfog\nnever\n")
    words = [
        f"run_dir={tiny.parent / 'measured'}",
        *ZERO_3,
        "cache_prompts=true",
        "ema.decay=0.9",
    ]
    words += [
        f"evaluation.prompts={tiny.parent / 'heldout.txt'}",
        "evaluation.every=1",
        "evaluation.limit=3",
    ]
    words += ["evaluation.stock_scheduler=true", "evaluation.videos=2"]
    on_two_ranks(tiny, *words, "steps=1")
    on_two_ranks(tiny, *words, "steps=2")
    folder = tiny.parent / "measured"
    rows = numbers(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2].keys() == {"step", "eval/brightness", "eval_stock/brightness"}
    # before the first step the base, after the last the average that is exported; by another route
    cfg = load(GrpoRun, tiny)
    prompts, seeds = (
        ["a dog", "a green star", "fog"],
        [derive_seed(0, "evaluate", i) for i in range(3)],
    )
    for row, adapter in ((rows[0], None), (rows[2], folder / "final_ema")):
        generator = build_generator(cfg.generator)
        if adapter is not None:
            generator.load_trained(adapter)
        for name, scheduler in (("eval", "euler"), ("eval_stock", "pipeline")):
            video = generator.decode(
                generator.sample(prompts, seeds, scheduler=scheduler)
            )
            want = Brightness().score(video, prompts, fps=8.0).value_B.mean()
            assert row[f"{name}/brightness"] == pytest.approx(float(want), abs=2e-4)
    assert abs(rows[0]["eval/brightness"] - rows[2]["eval/brightness"]) > 1e-6
    # d = 2/11 and 3/12: nearer to the last weights than to the first, and not the same
    raw = [
        adapter_of(folder, Path("checkpoints", f"step-00000{n}", "trained"))
        for n in (1, 2)
    ]
    average = adapter_of(folder, Path("final_ema"))
    for name in (name for name in average if "lora_B" in name):  # which starts at zero
        want = 3 / 12 * 9 / 11 * raw[0][name] + 9 / 12 * raw[1][name]
        torch.testing.assert_close(average[name], want, rtol=1e-4, atol=1e-7)
    samples = sorted(
        path.relative_to(folder / "evaluation")
        for path in (folder / "evaluation").rglob("*.mp4")
    )
    assert samples == [
        Path(f"step-00000{step}", f"000{i}.mp4") for step in (0, 1, 2) for i in (0, 1)
    ]
    assert rows[0]["forwards/grad"] == 4 * 2  # a step's, not an evaluation's


@pytest.mark.long
def test_out_of_memory_halves_batches_and_changes_no_bit(tiny: Path) -> None:
    """Memory for two videos: a run that starts with all four ends as one with two."""
    words = [
        sys.executable,
        str(ROOT / "launch" / "grpo.py"),
        "--config",
        str(tiny),
        "steps=2",
        "video_every=0",
    ]
    words += ["grpo.group_size=4"]
    two = ["generator.rollout_batch=2", "generator.decode_batch=2"]
    run(*words, f"run_dir={tiny.parent / 'told'}", *two)
    done = run(
        *words,
        f"run_dir={tiny.parent / 'found'}",
        "generator.rollout_batch=null",
        FAULT="memory:2",
    )
    assert done.stdout.count("memory ran") == 2
    told, found = (adapter_of(tiny.parent / name) for name in ("told", "found"))
    assert all(torch.equal(told[name], found[name]) for name in told)
    assert numbers(tiny.parent / "told") == numbers(tiny.parent / "found")


@pytest.mark.long
def test_out_of_memory_with_one_item_ends_the_run(tiny: Path) -> None:
    """The error names settings that take less memory, and earlier checkpoints stay."""
    words = [
        sys.executable,
        str(ROOT / "launch" / "grpo.py"),
        "--config",
        str(tiny),
        f"run_dir={tiny.parent / 'none'}",
    ]
    run(*words, "steps=1")
    done = run(*words, "steps=2", expect=1, FAULT="memory:0")
    assert "OutOfMemoryError" in done.stderr
    assert "zero_stage" in done.stderr
    assert "steps: 1" in done.stdout
    assert [path.name for path in (tiny.parent / "none" / "checkpoints").iterdir()] == [
        "step-000001"
    ]


@pytest.mark.long
def test_readme_reward_trains_a_wan(tiny: Path, tmp_path: Path) -> None:
    """The README's own reward, from its code block, through the real entry point."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.partition("# my_reward.py\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_reward.py").write_text(code)
    folder = tiny.parent / "own"
    words = [f"run_dir={folder}", "steps=2", "rewards.brightness.weight=0"]
    alone(tiny, *words, f"rewards.mine.target={tmp_path / 'my_reward.py'}:score")
    rows = numbers(folder)
    assert all(row["train/skipped"] == 0 and row["train/grad_norm"] > 0 for row in rows)
    assert rows[0]["reward/mine"] != rows[1]["reward/mine"]
    assert any(
        float(weight.abs().max()) > 0
        for name, weight in adapter_of(folder).items()
        if "lora_B" in name
    )


@pytest.mark.slow
def test_cache_prompts_frees_the_text_encoder(tiny: Path) -> None:
    """The second step's alone, where the first is done. The text encoder is gone."""
    cfg = load(GrpoRun, tiny, ["steps=2"])
    generator, schedule = (
        build_generator(cfg.generator),
        PromptSchedule(read_prompts(cfg.prompts), seed=0, prompts_per_step=4),
    )
    engine = PlainEngine(generator.module, accumulation=4)
    loop = GrpoLoop(
        cfg.grpo,
        generator=generator,
        rewards={},
        weights={},
        engine=engine,
        prompts=schedule,
        fps=8.0,
    )
    cache_prompts(cfg, loop, ["a dog"], 1)
    needed = {*schedule.at(1).prompts, "a dog", cfg.generator.sampler.negative_prompt}
    assert len(generator.prompts) == len(needed) < 7
    generator.sample(["a dog"], [1])
    left = min({*read_prompts(cfg.prompts)} - needed)
    with pytest.raises(RuntimeError, match=left):
        generator.sample([left], [1])


@pytest.mark.slow
def test_full_fine_tuning_exports_the_trained_weights(tiny: Path) -> None:
    """In bfloat16, with the norms that diffusers keeps in fp32."""
    folder = tiny.parent / "full"
    alone(
        tiny,
        f"run_dir={folder}",
        "generator.lora=null",
        "generator.dtype=bfloat16",
        "steps=1",
    )
    assert numbers(folder)[0]["train/ratio_max_dev"] < 1e-3
    cfg = load(GrpoRun, tiny, ["generator.lora=null", "generator.dtype=bfloat16"])
    tuned, base = build_generator(cfg.generator), build_generator(cfg.generator)
    tuned.load_trained(folder / "final")
    saved = load_tensors(folder / "checkpoints" / "step-000001" / "engine.safetensors")
    moved = 0
    for (name, weight), old in zip(
        tuned.module.named_parameters(), base.module.parameters(), strict=True
    ):
        assert torch.equal(weight, saved[f"weight.{name}"].to(torch.bfloat16)), name
        moved += not torch.equal(weight, old)
    assert moved > 40
    rows = str(tiny.parent / "full_samples")
    sample(
        SampleRun(
            rows, cfg.prompts, cfg.generator, adapter=str(folder / "final"), limit=1
        )
    )
    assert (Path(rows) / "0000.mp4").stat().st_size > 0
