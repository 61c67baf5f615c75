"""launch/grpo.py through the launchers, on a random tiny Wan of the real classes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from alignment.advantages import Advantages
from alignment.grpo import GrpoLoop, backwards_per_update
from alignment.prompts import PromptSchedule, read_prompts
from common.checkpoint import load_tensors
from common.config import ConfigError, load
from common.files import read_jsonl
from common.log import read_metrics
from launch.compose import build_generator
from launch.sample import sample
from launch.schemas.training import GrpoRun, SampleRun
from tests.alignment.per_member import per_member_gradient
from tests.fakes import PlainEngine
from tests.launch.processes import ROOT, deepspeed, refused_early, run

SCRIPT = str(ROOT / "launch" / "grpo.py")
SAFE = {".json", ".jsonl", ".yaml", ".safetensors", ".mp4"}  # no pickle anywhere
CONFIGS = sorted((ROOT / "configs").glob("*/grpo.yaml"))


def alone(config: Path, *overrides: str) -> None:
    run(sys.executable, SCRIPT, "--config", str(config), *overrides)


def on_two_ranks(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return deepspeed(2, SCRIPT, "--config", str(config), *overrides)


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_grpo_configs_load(path: Path) -> None:
    cfg = load(GrpoRun, path)
    assert cfg.rewards["descore"].weight == 1.0
    assert (
        cfg.generator.sampler.max_std == {"wan": 0.45, "shapes": 0.7}[path.parent.name]
    )


def test_wan_config_has_the_numbers_of_table_9() -> None:
    """LongCat-Video 2510.22200, Table 9."""
    cfg = load(GrpoRun, ROOT / "configs" / "wan" / "grpo.yaml")
    sampler, lora = cfg.generator.sampler, cfg.generator.lora
    assert (cfg.prompts_per_step, cfg.grpo.group_size, cfg.grpo.kl_weight) == (
        64,
        4,
        3e-4,
    )
    assert (
        sampler.num_steps,
        sampler.stochastic_range,
        sampler.noise_level,
        sampler.max_std,
    ) == (16, 6, 1.0, 0.45)
    assert (lora.rank, lora.alpha, len(lora.targets), cfg.optimizer.lr) == (
        128,
        64.0,
        6,
        1e-4,
    )


def test_config_typo_exits_2_before_torch_with_the_right_key() -> None:
    typos = ["sampler.num_stpes=4", "grpo.group_size=1", "--local_rank=0"]
    said = refused_early(SCRIPT, "--config", str(CONFIGS[0]), *typos)
    assert "generator.sampler.num_steps" in said
    assert "group_size" in said


def test_grpo_config_that_cannot_learn_raises() -> None:
    base = ["run_dir=x", "prompts=x", "generator.path=x"]
    for overrides, message in [
        ([], "rewards"),
        (["rewards.brightness.weight=0"], "weight"),
        (
            ["rewards.brightness.weight=1", "zero_stage=4"],
            "zero_stage",
        ),
        (
            ["rewards.brightness.weight=1", "generator.sampler.noise_level=0"],
            "noise_level",
        ),
        (["rewards.mine.kind=descor"], "descore"),
        (
            [
                "rewards.brightness.weight=1",
                "zero_stage=3",
                "generator.sampler.tail_cache=2",
            ],
            "tail_cache",
        ),
        (
            [
                "rewards.brightness.weight=1",
                "zero_stage=3",
                "generator.sampler.merge_adapter=true",
            ],
            "merge_adapter",
        ),
        (
            ["rewards.brightness.weight=1", "grpo.ranks_per_group=3"],
            "group_size",
        ),
        (
            ["rewards.brightness.weight=1", "ema.decay=1"],
            "decay",
        ),
        (
            ["rewards.brightness.weight=1", "evaluation.every=1"],
            "evaluation.prompts",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(GrpoRun, None, [*base, *overrides])


def test_sample_run_defaults() -> None:
    cfg = load(SampleRun, None, ["out=x", "prompts=x", "generator.path=x", "seeds=3"])
    assert (cfg.adapter, cfg.seeds, cfg.scheduler) == (None, 3, "euler")


@pytest.mark.slow
def test_ranks_that_cannot_share_prompts_exit_2_with_the_numbers() -> None:
    words = [sys.executable, SCRIPT, "--config", str(CONFIGS[0]), "prompts_per_step=8"]
    done = run(*words, expect=2, WORLD_SIZE="3", RANK="0")
    assert "2.67" in done.stderr
    words = [
        sys.executable,
        SCRIPT,
        "--config",
        str(CONFIGS[0]),
        "prompts_per_step=3",
        "grpo.ranks_per_group=2",
    ]
    assert (
        "grpo.ranks_per_group=2"
        in run(*words, expect=2, WORLD_SIZE="3", RANK="0").stderr
    )
    done = run(*words, expect=2, WORLD_SIZE="4", RANK="0")
    assert "1.50" in done.stderr


@pytest.mark.slow
def test_bad_prompt_file_exits_2_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    words = [
        sys.executable,
        SCRIPT,
        "--config",
        str(CONFIGS[0]),
        f"prompts={tmp_path / 'p.jsonl'}",
    ]
    done = run(*words, expect=2)
    assert "p.jsonl:2:" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    """Four steps in one go, on two ranks under the deepspeed launcher."""
    folder = tiny.parent / "whole"
    on_two_ranks(tiny, f"run_dir={folder}")
    return folder


def adapter_of(folder: Path, part: Path = Path("final")) -> dict[str, torch.Tensor]:
    return load_tensors(folder / part / "pytorch_lora_weights.safetensors")


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics without wall-clock times."""
    timed = ("seconds/", "videos_per_second", "memory/")
    rows = read_metrics(folder / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in rows
    ]


@pytest.fixture(scope="module")
def half(tiny: Path) -> Path:
    """The same run stopped after two steps."""
    folder = tiny.parent / "half"
    on_two_ranks(tiny, f"run_dir={folder}", "steps=2")
    return folder


def continued(tiny: Path, half: Path, name: str) -> Path:
    """A copy of the stopped run under another name, with a metrics line torn by a kill."""
    folder = tiny.parent / name
    shutil.copytree(half, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/bright')
    return folder


@pytest.mark.long
def test_resumed_grpo_run_equals_an_uninterrupted_run(
    tiny: Path, whole: Path, half: Path
) -> None:
    folder = continued(tiny, half, "resumed")
    done = on_two_ranks(tiny, f"run_dir={folder}")
    assert "after 2 " in done.stdout
    assert numbers(folder) == numbers(whole)
    assert [row["step"] for row in numbers(folder)] == [0, 1, 2, 3]
    ours, theirs = adapter_of(folder), adapter_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(
        float(ours[name].abs().max()) > 0 for name in ours if "lora_B" in name
    )  # something was learned


@pytest.mark.long
def test_one_rank_matches_two_ranks_and_resumes_their_run(
    tiny: Path, whole: Path, half: Path
) -> None:
    """From the start without ZeRO, and from the two ranks' checkpoint of step 2."""
    first = Path("checkpoints", "step-000001", "trained")
    alone(tiny, f"run_dir={tiny.parent / 'alone'}", "zero_stage=0")
    alone(tiny, f"run_dir={continued(tiny, half, 'taken_over')}")
    for name in ("alone", "taken_over"):
        folder = tiny.parent / name
        assert_close(adapter_of(whole, first), adapter_of(folder, first), relative=1e-5)
        # later, Adam magnifies a rounding of 1e-7 wherever a gradient is nearly zero
        assert_close(adapter_of(whole), adapter_of(folder), relative=1e-2)
        assert (
            numbers(folder)[0].items()
            >= {k: v for k, v in numbers(whole)[0].items() if "train" not in k}.items()
        )
        for one, two in zip(numbers(whole), numbers(folder), strict=True):
            for key in one.keys() & two.keys():
                assert one[key] == pytest.approx(two[key], abs=1e-5, rel=2e-3), key


@pytest.mark.long
def test_zero_3_resumes_from_zero_1_and_matches_it(
    tiny: Path, whole: Path, half: Path
) -> None:
    """The stochastic steps k of step 3 are 0 and 1 on rank 0, and 0 and 0 on rank 1.

    With one latent per forward a group of 2 takes k + 1 + 2 (5 - k) = 11 - k of them, so
    rank 0 makes one more, idle and of one sample.
    """
    folder = continued(tiny, half, "three")
    # the linears of the base are split
    above = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
    on_two_ranks(
        tiny, f"run_dir={folder}", "generator.rollout_batch=1", "zero_stage=3", above
    )
    assert_close(adapter_of(whole), adapter_of(folder), relative=1e-2)
    idle = [0, 0, 0, 1]
    for one, three in zip(numbers(whole), numbers(folder), strict=True):
        assert one.keys() == three.keys()
        assert three.pop("forwards/no_grad") == one.pop("forwards/no_grad") + idle.pop(
            0
        )
        assert three["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)
        for key in one:
            assert three[key] == pytest.approx(one[key], abs=1e-5, rel=2e-3), key


def assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, relative: float
) -> None:
    """Allow 1e-5 for every weight; and for B, which starts at zero, ``relative`` to its norm."""
    for key, tensor in ours.items():
        if "lora_B" in key:
            assert float((tensor - theirs[key]).norm()) < relative * float(
                tensor.norm()
            ), key
        assert float((tensor - theirs[key]).abs().max()) < max(1e-5, 1e-2 * relative), (
            key
        )


@pytest.mark.slow
def test_grpo_run_writes_metrics_checkpoints_and_samples(whole: Path) -> None:
    # rollouts of c [(k + 1) + G (T - k - 1)] samples, T = 6, G = 2, c = 2 for guidance,
    # k drawn for each of 4 prompts; then c for the reference, and c with gradient
    rollouts = [2 * ((k + 1) + 2 * (6 - k - 1)) for k in range(3)]
    possible = {sum(four) for four in itertools.product(rollouts, repeat=4)}
    for row in numbers(whole):
        assert row["train/ratio_max_dev"] < 1e-5
        assert row["forwards/grad"] == 4 * 2
        assert row["forwards/no_grad"] - 4 * 2 in possible
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {
        f"step-00000{n}" for n in (1, 2, 3, 4)
    }
    assert (
        whole
        / "checkpoints"
        / "step-000004"
        / "trained"
        / "pytorch_lora_weights.safetensors"
    ).is_file()
    assert {path.suffix for path in whole.rglob("*") if path.is_file()} <= SAFE
    assert (
        yaml.safe_load((whole / "config.yaml").read_text())["grpo"]["group_size"] == 2
    )
    samples = whole / "samples" / "step-000002"
    lines = read_jsonl(samples / "samples.jsonl")
    assert [line["member"] for line in lines] == [0, 1]
    assert all((samples / line["file"]).stat().st_size > 0 for line in lines)
    better, worse = sorted(lines, key=lambda line: -line["rewards"]["brightness"])
    assert better["advantage"] == pytest.approx(-worse["advantage"])
    assert better["advantage"] > 0


# ------------------------------------------------------------------ the loop in this process


def updated_once(
    tiny: Path, *, double: bool = False, per_member: bool = False, **changes: object
) -> tuple[torch.Tensor, dict[str, float]]:
    """Make an update with a random adapter and given advantages; gradient and metrics.

    ``per_member`` takes the gradient with a forward for each member, and makes no update.
    """
    cfg = load(GrpoRun, tiny, [f"{key}={value}" for key, value in changes.items()])
    generator = build_generator(cfg.generator)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    if double:
        generator.module.double()
    accumulation = backwards_per_update(
        cfg.grpo, cfg.prompts_per_step, ranks=1, steps_per_group=1
    )
    engine = PlainEngine(generator.module, accumulation=accumulation)
    schedule = PromptSchedule(
        read_prompts(cfg.prompts), seed=0, prompts_per_step=cfg.prompts_per_step
    )
    loop = GrpoLoop(
        cfg.grpo,
        generator=generator,
        rewards={},
        weights={},
        engine=engine,
        prompts=schedule,
        fps=8.0,
    )
    batch = schedule.at(0)
    groups = generator.rollout(
        batch.prompts, group_size=cfg.grpo.group_size, seeds=batch.seeds
    )
    advantage_PG = torch.randn(len(groups), cfg.grpo.group_size, generator=draw)
    if per_member:
        gradients, _ = per_member_gradient(generator, groups, advantage_PG, cfg.grpo)
        return torch.cat([gradient.flatten() for gradient in gradients]), {}
    metrics = loop.objective.update(
        groups, Advantages(advantage_PG, anything_to_learn=True, means={}, details={})
    )
    return torch.cat([gradient.flatten() for gradient in engine.last_gradient]), metrics


@pytest.mark.slow
@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-6), (True, 1e-12)])
def test_collapsed_and_per_member_updates_have_equal_gradients(
    tiny: Path, tolerance: float, monkeypatch: pytest.MonkeyPatch, *, double: bool
) -> None:
    if double:
        # diffusers' Wan computes its norms and modulations in fp32 by calling .float()
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    options = {
        "double": double,
        "prompts_per_step": 2,
        "grpo.group_size": 3,
        "grpo.kl_weight": 0.1,
    }
    collapsed, metrics = updated_once(tiny, **options)
    per_member, _ = updated_once(tiny, **options, per_member=True)
    assert metrics["train/kl"] > 0
    assert float((collapsed - per_member).norm()) < tolerance * float(per_member.norm())


@pytest.mark.slow
def test_bf16_weights_with_fp32_adapter_have_ratio_1(tiny: Path) -> None:
    options = {
        "generator.dtype": "bfloat16",
        "generator.gradient_checkpointing": "true",
    }
    gradient, metrics = updated_once(tiny, **options)
    assert metrics["train/ratio_max_dev"] < 1e-3
    assert gradient.dtype == torch.float32
    exact, metrics = updated_once(tiny)
    assert metrics["train/ratio_max_dev"] < 1e-5
    assert (
        float(torch.cosine_similarity(gradient, exact, dim=0)) > 0.5
    )  # of a random network, guided at scale 3


@pytest.mark.slow
def test_sampling_with_adapter_changes_videos_not_seeds(
    tiny: Path, whole: Path
) -> None:
    cfg = load(GrpoRun, tiny)
    rows = {}
    for name, adapter in (("base", None), ("tuned", str(whole / "final"))):
        folder = str(tiny.parent / name)
        sample(
            SampleRun(
                folder, cfg.prompts, cfg.generator, adapter=adapter, seeds=2, limit=2
            )
        )
        rows[name] = read_jsonl(tiny.parent / name / "samples.jsonl")
        assert len(list((tiny.parent / name).glob("*.mp4"))) == len(rows[name]) == 4
        prompts = ["a red circle"] * 2 + ["a blue square"] * 2
        assert [row["prompt"] for row in rows[name]] == prompts
    assert [row["seed"] for row in rows["base"]] == [
        row["seed"] for row in rows["tuned"]
    ]
    assert len({row["seed"] for row in rows["base"]}) == 4
    videos = [(tiny.parent / name / "0000.mp4").read_bytes() for name in rows]
    assert videos[0] != videos[1]
