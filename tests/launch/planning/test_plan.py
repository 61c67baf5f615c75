"""What a plan says of full size against the published counts, formulas by hand, and small tensors one can count."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import load
from generator.config import GeneratorConfig
from launch.planning.advice import Less
from launch.planning.dry_run import lines_of, missing_inputs, parse_where
from launch.planning.known_models import judge_like
from launch.planning.meta_device import LiveMemory, cost_of
from launch.planning.models import (
    Lengths,
    RewardModelOnMeta,
    WanOnMeta,
    lengths_of,
    sizes_of,
)
from launch.planning.runs import (
    DEVICES,
    GIB,
    RESERVE,
    Part,
    Phase,
    Plan,
    Where,
    plan_grpo,
    plan_reward_model,
    training_parts,
)
from launch.schemas.pairs import DpoRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun, SampleRun
from rm.config import VideoSettings
from tests.launch.processes import ROOT, run

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
H100 = Where(DEVICES["h100"], 8)
REWARD = "rewards.descore.checkpoint"


# ------------------------------------------------------------------ counting on the meta device


def test_flops_of_products_and_attention() -> None:
    a, b = torch.empty(30, 40, device="meta"), torch.empty(40, 50, device="meta")
    assert cost_of(lambda: a @ b).flops == 2 * 30 * 40 * 50
    q = torch.empty(1, 2, 1000, 16, device="meta")
    cost = cost_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert cost.flops == 2 * (2 * 2 * 1000 * 1000 * 16)
    assert (
        cost.peak < 2 * 1000 * 1000
    )  # bytes: one head's scores alone would be twice that


def test_memory_that_is_alive_at_one_time() -> None:
    before = torch.empty(1000, device="meta")
    with LiveMemory() as memory:
        before.add_(1).view(10, 100)  # was there already
        x = torch.empty(1000, device="meta")  # 4,000 bytes
        y = x + 1  # 8,000
        view = y[:10]  # nothing new
        x.add_(1)
        del x  # 4,000
        z = torch.cat([y, y])  # 12,000
        del y  # the view holds it
        assert (memory.live, memory.peak) == (12_000, 12_000)
        del view, z
        assert (memory.live, memory.peak) == (0, 12_000)


def test_memory_of_a_backward() -> None:
    """One linear of 100 x 100 on 1,000 rows: input, output and its gradient, the weight's and the input's gradient."""
    linear = torch.nn.Linear(100, 100, bias=False, device="meta")

    def run() -> None:
        linear(
            torch.empty(1000, 100, device="meta", requires_grad=True)
        ).square().sum().backward()
        linear.weight.grad = None

    rows, weight = 4 * 1000 * 100, 4 * 100 * 100
    # input, output, square; then of square: 2 x output and gradient; the largest moment is known to a row or two
    assert 4 * rows <= cost_of(run).peak <= 6 * rows + 2 * weight


# ------------------------------------------------------------------ models


def flops_by_hand(
    tokens: int, *, text: int = 512, d: int = 1536, wide: int = 8960, layers: int = 30
) -> float:
    """Projections, feed-forward, self-attention, cross-attention, keys and values of the text."""
    linear = 2 * tokens * (6 * d * d + 2 * d * wide)
    return layers * (
        linear + 4 * tokens**2 * d + 4 * tokens * text * d + 4 * text * d * d
    )


@pytest.mark.parametrize(
    ("height", "width", "frames", "tokens", "published"),
    [
        (480, 832, 81, 32_760, 283e12),
        (480, 832, 33, 14_040, 73e12),
        (240, 416, 33, 3_510, 11.5e12),
    ],
)
def test_wan_at_its_sizes(
    height: int, width: int, frames: int, tokens: int, published: float
) -> None:
    cfg = GeneratorConfig(WAN, height=height, width=width, num_frames=frames)
    wan = WanOnMeta(cfg)
    assert wan.tokens == tokens
    assert sizes_of(wan.transformer).parameters == 1_418_996_800
    with torch.no_grad():
        flops = cost_of(
            lambda: wan.transformer(**wan._inputs(1), return_dict=False)
        ).flops
    assert flops == pytest.approx(flops_by_hand(tokens), rel=0.002)
    assert flops == pytest.approx(published, rel=0.02)


def test_the_14b() -> None:
    """98 TFLOP a forward at 240 x 416 x 33, published count."""
    wan = WanOnMeta(
        GeneratorConfig(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers", height=240, width=416, num_frames=33
        )
    )
    assert sizes_of(wan.transformer).parameters == pytest.approx(14.29e9, rel=0.001)
    with torch.no_grad():
        flops = cost_of(
            lambda: wan.transformer(**wan._inputs(1), return_dict=False)
        ).flops
    assert flops == pytest.approx(
        flops_by_hand(3_510, d=5120, wide=13_824, layers=40), rel=0.005
    )
    assert flops == pytest.approx(98e12, rel=0.01)


def test_what_surrounds_the_transformer() -> None:
    wan = WanOnMeta(GeneratorConfig(WAN))
    assert wan.latent_shape == (16, 21, 60, 104)
    lora = wan.cfg.lora
    each = 8 * lora.rank * (1536 + 1536) + 2 * lora.rank * (1536 + 8960)
    assert sizes_of(wan.module).trained == 30 * each  # 175 M
    assert sizes_of(wan.vae).parameters == pytest.approx(127e6, rel=0.01)
    assert sizes_of(wan.text_encoder).parameters == pytest.approx(5.68e9, rel=0.01)
    assert wan.encode_text().flops == pytest.approx(
        2 * 24 * 512 * (4 * 4096 * 4096 + 3 * 4096 * 10_240), rel=0.1
    )


def test_a_judge_reads_a_video() -> None:
    """Five seconds at two frames a second: ten frames in five patches of time; 24 TFLOP for 1,400 tokens by 2 N L."""
    lengths = lengths_of(VideoSettings(), frames=81, fps=16.0, height=480, width=832)
    assert (lengths.grid, lengths.video) == ((5, 20, 36), 5 * 10 * 18)
    judge = RewardModelOnMeta("Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16")
    places = lengths.video + lengths.prompt
    cost = judge.read(1, lengths, places=places, grad=False)
    inside = (
        sizes_of(judge.model.backbone.model.language_model).parameters - 151_936 * 4096
    )
    eye = sizes_of(judge.model.backbone.model.visual).parameters
    by_hand = (
        2 * inside * places
        + 36 * 2 * places**2 * 4096
        + 2 * eye * math.prod(lengths.grid)
    )
    assert cost.flops == pytest.approx(by_hand, rel=0.05)
    assert judge.cache_bytes(1000) == 36 * 2 * 8 * 128 * 1000 * 2
    assert judge.language.parameters == inside + 151_936 * 4096


def test_the_8b_has_the_names_of_a_public_index() -> None:
    """That of nvidia/Cosmos-Reason2-8B, which was trained from Qwen3-VL-8B, as mirrored on GitHub: 67,748 characters
    of JSON, a line for each name. An index has no shapes; what they add up to is counted in tests/rm/test_full_size.py.
    """
    judge = RewardModelOnMeta("Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16")
    names = [name for name, _ in judge.model.backbone.named_parameters()]
    index = {
        "metadata": {"total_size": 0},
        "weight_map": dict.fromkeys(names, "model-00001-of-00004.safetensors"),
    }
    assert (len(names), len(json.dumps(index, indent=2))) == (750, 67_748)
    assert (names[0], names[-2:]) == (
        "model.visual.patch_embed.proj.weight",
        ["model.language_model.norm.weight", "lm_head.weight"],
    )


# ------------------------------------------------------------------ runs


def test_optimizer_under_zero_by_hand() -> None:
    """1,000 trained fp32 parameters among 3,000 bf16 ones, four ranks."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1000))])
    module.append(
        torch.nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16), requires_grad=False)
    )
    want = {0: (10_000, 4_000, 8_000, 12_000), 1: (10_000, 4_000, 3_000, 3_000)}
    want |= {2: (10_000, 1_000, 3_000, 3_000), 3: (2_500, 1_000, 3_000, 3_000)}
    for stage, expected in want.items():
        parts = training_parts("m", sizes_of(module), zero_stage=stage, ranks=4)
        assert tuple(part.bytes for part in parts) == expected


def test_the_peak_is_what_stays_and_the_largest_of_what_passes() -> None:
    parts = [
        Part("a", 10.0),
        Part("b", 5.0),
        Part("c", 7.0, passing=True),
        Part("d", 9.0, passing=True),
    ]
    plan = Plan(
        [], parts, [Phase("x", 1e12, 2.0), Phase("y", 1e12, 3.0)], "update", 720, 0.0
    )
    assert plan.peak == 24.0 + RESERVE
    assert "720 of them: 1.0 hours" in "\n".join(lines_of(plan, H100))


def test_what_does_not_fit_ends_with_numbers_and_advice() -> None:
    """3 GiB stay, 2 and 16 pass: with 4 in reserve 23 GiB. Where there are 10, the part of 2 GiB is none of the
    problem: 3 + 4 + 2 fit.
    """
    parts = [
        Part("a", 3 * GIB),
        Part("b", 16 * GIB, passing=True),
        Part("c", 2 * GIB, passing=True),
    ]
    plan = Plan([], parts, [Phase("x", 1e12, 2.0)], "update", 720, 0.0)
    less = {
        "a": Less(("x=1",), "more ranks"),
        "b": Less(("y=1", "z=1 u=2")),
        "c": Less(("v=1",)),
    }
    said = lines_of(
        plan, Where(replace(DEVICES["h100"], memory=10 * GIB), 2), less=less
    )
    assert said[-5:] == [
        "  DOES NOT FIT: a rank needs 23.0 GiB and has 10.0, 13.0 are missing.",
        "  The largest parts, and what makes them smaller:",
        "      16.0  b: y=1, or z=1 u=2",
        "       3.0  a: x=1; more ranks",
        "  As it is, it fits 2 x h100, h200, a100, 4090.",
    ]
    larger = replace(plan, parts=[Part("a", 100 * GIB)])
    assert lines_of(larger, H100)[-1] == "  As it is, it fits 8 x h200."
    assert (
        "none of the devices"
        in lines_of(replace(plan, parts=[Part("a", 200 * GIB)]), H100)[-1]
    )
    assert lines_of(plan, H100)[-1] == "  it goes: a rank needs 23.0 of 79.6 GiB"


def test_a_judge_that_is_not_there_is_of_the_size_it_says() -> None:
    for name, size in (
        ("models/Qwen3-VL-2B-Instruct", "2B"),
        ("runs/descore_4b/final", "4B"),
        ("runs/8b/from_2b", "2B"),
        ("nope", "8B"),
        ("models/14b", "8B"),
        ("models/x2bit", "8B"),
    ):
        assert judge_like(name) == f"Qwen/Qwen3-VL-{size}-Instruct"
    judge = RewardModelOnMeta("nope_2b", dtype="bfloat16")
    assert sizes_of(judge.model).parameters == pytest.approx(2.13e9, rel=0.01)


@pytest.mark.parametrize(
    ("schema", "name", "words", "key"),
    [
        (ColdStartRun, "cold_start", ["base=nope"], "base"),
        pytest.param(
            DualRlRun,
            "dual_rl",
            ["checkpoint=nope"],
            "checkpoint",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            GrpoRun, "grpo", [f"{REWARD}=nope"], REWARD, marks=pytest.mark.slow
        ),
    ],
)
def test_an_assumed_model_is_said_at_the_top_and_beside_the_total(
    schema: type, name: str, words: list[str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny judge of the embedded world stands for the 8B, which would take half a minute."""
    tiny = str(ROOT / "assets" / "shapes" / "qwen")
    monkeypatch.setattr("launch.planning.known_models.judge_like", lambda name: tiny)
    monkeypatch.chdir(ROOT)
    cfg = load(schema, ROOT / "configs" / "shapes" / f"{name}.yaml", words)
    plan = (plan_grpo if schema is GrpoRun else plan_reward_model)(cfg, H100)
    note = (
        f"  NOTE {key}: nope is neither a folder nor a known model, planned as {tiny}"
    )
    said = lines_of(plan, H100)
    assert said[1] == note
    assert said.count(note) == 2
    assert said[said.index(note, 2) - 1].startswith(
        ("    together", f"  {plan.count:,} of them")
    )
    there = load(
        schema,
        ROOT / "configs" / "shapes" / f"{name}.yaml",
        [f"{words[0].partition('=')[0]}={tiny}"],
    )
    assert (plan_grpo if schema is GrpoRun else plan_reward_model)(
        there, H100
    ).assumed == []


def test_files_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    wan = {
        name: ROOT / "configs" / "wan" / f"{name}.yaml"
        for name in ("grpo", "dpo", "cold_start", "sample")
    }

    def keys(schema: type, name: str, *words: str, planned: bool = True) -> list[str]:
        said = missing_inputs(load(schema, wan[name], words), planned=planned)
        assert all(
            line.endswith(" is not there; the run would refuse") for line in said
        )
        return [line.partition(":")[0] for line in said]

    assert keys(GrpoRun, "grpo", "evaluation.prompts=e.txt") == [
        "prompts",
        "evaluation.prompts",
    ]
    assert keys(GrpoRun, "grpo", "prompts=p.txt") == []
    assert keys(GrpoRun, "grpo", "prompts=p.txt", planned=False) == [
        "rewards.descore.checkpoint"
    ]
    assert keys(DpoRun, "dpo") == ["pairs"]
    assert keys(ColdStartRun, "cold_start", "data.heldout=null") == ["data.train"]
    assert keys(SampleRun, "sample", "adapter=x", "prompts=p.txt", planned=False) == [
        "adapter"
    ]


def test_where() -> None:
    assert parse_where("8xH100@0.4") == Where(DEVICES["h100"], 8, 0.4)
    assert parse_where("a100") == Where(DEVICES["a100"], 1, 0.5)
    for wrong in ("8xh999", "0xh100", "8h100", "h100@2", ""):
        with pytest.raises(SystemExit) as ended:
            parse_where(wrong)
        assert ended.value.code == 2


@pytest.mark.parametrize("program", ["grpo", "score"])
def test_a_wrong_device_comes_before_anything_is_printed(program: str) -> None:
    words = [
        sys.executable,
        f"launch/{program}.py",
        "--config",
        f"configs/shapes/{program}.yaml",
        "--dry-run",
        "8xh900",
    ]
    done = run(*words, expect=2)
    assert done.stdout == ""
    assert "--dry-run 8xh900: want GPUSxDEVICE" in done.stderr


def test_a_dry_run_needs_none_of_a_programs_own_options() -> None:
    words = [sys.executable, "launch/score.py", "--config", "configs/shapes/score.yaml"]
    assert (
        "nothing is planned for a ScoreRun: the config is valid"
        in run(*words, "--dry-run").stdout
    )
    assert (
        "the following arguments are required: --prompts, --out"
        in run(*words, expect=2).stderr
    )


@pytest.mark.long
def test_the_recipe_costs_what_longcat_published() -> None:
    """2,119 PFLOP an update on Wan 1.3B: 117 forwards of 283 TFLOP for each of 64 groups, 535 s on eight H100 at 50 %.
    The adapter's own products come on top here.
    """
    cfg = load(GrpoRun, ROOT / "configs" / "wan" / "grpo.yaml")
    plan = plan_grpo(cfg, H100)
    found = {phase.name: phase for phase in plan.phases}
    transformer = found["rollout"].flops + found["update"].flops
    assert 8 * transformer == pytest.approx(2_119e15, rel=0.15)
    assert found["rollout"].seconds + found["update"].seconds == pytest.approx(
        535, rel=0.15
    )
    assert found["rollout"].flops / found["update"].flops == pytest.approx(
        107 / 10, rel=0.1
    )
    assert not plan.problems
    assert 40 * GIB < plan.peak < 79 * GIB
    assert plan_grpo(
        replace(cfg, cache_prompts=False), H100
    ).peak - plan.peak == pytest.approx(11.36e9, rel=0.01)
    assert plan_grpo(cfg, replace(H100, ranks=7)).problems


@pytest.mark.long
def test_the_cold_start_on_8b() -> None:
    cfg = load(ColdStartRun, ROOT / "configs" / "wan" / "cold_start.yaml")
    short = Lengths((5, 20, 36), 900, prompt=100, chain=200)
    plan = plan_reward_model(cfg, H100, short)
    weights = next(part for part in plan.parts if part.name == "judge: weights")
    assert weights.bytes == pytest.approx(
        2 * 8.767e9 + 2 * 0.175e9, rel=0.02
    )  # and LoRA of rank 64
    # a frozen linear costs its forward, its recomputation and the gradient of its input
    once = 2 * 6.95e9 * short.whole + 2 * 0.576e9 * 3600
    assert 8 * plan.phases[0].flops == pytest.approx(32 * 2 * 3 * once, rel=0.15)
    assert plan.peak < 79 * GIB


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["grpo", "dpo", "pairs", "cold_start", "dual_rl", "sample"]
)
def test_every_program_says_what_it_needs_before_it_loads_anything(
    name: str, tmp_path: Path
) -> None:
    words = [
        sys.executable,
        f"launch/{name}.py",
        "--config",
        f"configs/shapes/{name}.yaml",
        "--dry-run",
        "2xa100",
    ]
    required = {
        "grpo": ["run_dir=r", "rewards.descore.checkpoint=assets/shapes/qwen"],
        "dpo": ["run_dir=r", "pairs=nowhere"],
        "pairs": ["out=o", "rewards.descore.checkpoint=assets/shapes/qwen"],
        "cold_start": ["run_dir=r", "data.train=nowhere.csv"],
        "dual_rl": [
            "run_dir=r",
            "checkpoint=assets/shapes/qwen",
            "data.train=nowhere.csv",
        ],
        "sample": ["out=o"],
    }
    done = run(*words, *required[name])
    assert "seed: " in done.stdout
    if name == "sample":
        assert "nothing is planned" in done.stdout
    else:
        assert "plan for 2 x A100 SXM 80 GB at 50% of its peak" in done.stdout
        assert "of the device" in done.stdout
    assert not (ROOT / "r").exists()
