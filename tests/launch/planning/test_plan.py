"""Plans against published counts, formulas by hand, and small tensors."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import load
from generator.config import ExpertsConfig, GeneratorConfig
from launch import score
from launch.command import read_command
from launch.planning.dry_run import lines_of, missing_inputs, parse_where
from launch.planning.forwards import samples_per_rollout
from launch.planning.known_models import closest_qwen3_vl
from launch.planning.meter import Cost, Meter
from launch.planning.models import (
    Lengths,
    MetaRewardModel,
    MetaWan,
    lengths_of,
    sizes_of,
)
from launch.planning.plan import (
    DEVICES,
    GIB,
    RESERVE,
    Part,
    Phase,
    Plan,
    Where,
    training_parts,
)
from launch.planning.runs import (
    _shared,
    _with_frozen,
    plan_grpo,
    plan_reward_model,
)
from launch.schemas.evaluation import ScoreRun
from launch.schemas.pairs import DpoRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun, SampleRun
from rm.config import VideoSettings
from tests.launch.processes import ROOT, run

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
H100 = Where(DEVICES["h100"], 8)
REWARD = "rewards.descore.checkpoint"


# ------------------------------------------------------------------ counting on the meta device


def test_cost_of_products_and_attention_by_hand() -> None:
    with Meter(H100.rates) as meter:
        a = torch.empty(30, 40, device="meta")
        b = torch.empty(40, 50, device="meta")
        assert meter.cost(lambda: a @ b).flops == 2 * 30 * 40 * 50
        q = torch.empty(1, 2, 1000, 16, device="meta", dtype=torch.bfloat16)
        cost = meter.cost(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
        )
    assert cost.flops == 2 * (2 * 2 * 1000 * 1000 * 16)
    # bytes: one head's scores alone would be as many
    assert cost.peak < 2 * 1000 * 1000


def test_seconds_of_a_call_are_those_of_its_slowest_limit() -> None:
    """A large product by its FLOPs, a sum by its bytes, a tiny call by Python."""
    rates = H100.rates
    with Meter(rates) as meter:
        a = torch.empty(8192, 8192, device="meta", dtype=torch.bfloat16)
        b = torch.empty(8, device="meta")
        product = meter.cost(lambda: a @ a)
        copy = meter.cost(lambda: a + 1)
        tiny = meter.cost(lambda: b + 1)
    assert product.seconds == pytest.approx(2 * 8192**3 / rates.gemm_bf16)
    assert copy.seconds == pytest.approx(4 * 8192**2 / rates.bytes)
    assert tiny.seconds == pytest.approx(rates.host)


def test_costs_add_up_and_keep_the_largest_peak() -> None:
    total = Cost(1.0, 2.0, 30.0) * 3 + Cost(4.0, 5.0, 6.0)
    assert total == Cost(7.0, 11.0, 30.0)


def test_tf32_is_as_before_after_a_plan() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    a = torch.empty(4096, 4096, device="meta")
    seconds = {}
    for tf32 in (False, True):
        with Meter(H100.rates, tf32=tf32) as meter:
            seconds[tf32] = meter.cost(lambda: a @ a).seconds
    assert torch.backends.cuda.matmul.allow_tf32 == before
    ratio = H100.rates.gemm_tf32 / H100.rates.gemm_fp32
    assert seconds[False] / seconds[True] == pytest.approx(ratio)


def test_cost_of_backward_peak_within_bounds() -> None:
    """A linear of 100 x 100 on 1,000 rows: input, output, and the gradients of all."""
    linear = torch.nn.Linear(100, 100, bias=False, device="meta")

    def run() -> None:
        rows = torch.empty(1000, 100, device="meta", requires_grad=True)
        linear(rows).square().sum().backward()
        linear.weight.grad = None

    with Meter(H100.rates) as meter:
        cost = meter.cost(run)
    rows, weight = 4 * 1000 * 100, 4 * 100 * 100
    # input, output, square; then of square: 2 x output and gradient;
    # the largest moment is known to a row or two
    assert 4 * rows <= cost.peak <= 6 * rows + 3 * weight


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
        pytest.param(480, 832, 33, 14_040, 73e12, marks=pytest.mark.slow),
        pytest.param(240, 416, 33, 3_510, 11.5e12, marks=pytest.mark.slow),
    ],
)
def test_wan_tokens_and_flops_match_published_counts(
    height: int, width: int, frames: int, tokens: int, published: float
) -> None:
    cfg = GeneratorConfig(WAN, height=height, width=width, num_frames=frames, lora=None)
    with Meter(H100.rates) as meter:
        wan = MetaWan(cfg, meter)
        assert wan.tokens == tokens
        assert sizes_of(wan.transformer).parameters == 1_418_996_800
        flops = wan.forward(1, grad=False).flops
    assert flops == pytest.approx(flops_by_hand(tokens), rel=0.002)
    assert flops == pytest.approx(published, rel=0.02)


_LOAD_AFTER_A_PLAN = """
import torch
from launch.planning.meter import Meter
from launch.planning.plan import DEVICES, Where

with Meter(Where(DEVICES["h100"], 8).rates) as meter:
    meter.cost(lambda: torch.zeros(2, device=meter.gpu.device))
    with torch.device("meta"):
        torch.nn.Linear(2, 2)
with torch.device("meta"):
    assert torch.tensor([]).device.type == "meta"
"""


def test_plan_leaves_no_trace_in_what_pytorch_caches() -> None:
    """In a process of its own: the cache is filled once."""
    run(sys.executable, "-c", _LOAD_AFTER_A_PLAN)


# Counted on meta by another script: one forward of one sample, in TFLOP.
FORWARDS = [
    ("Wan2.1-T2V-14B", (480, 832, 81), 32_760, 1678.4),
    ("Wan2.1-T2V-14B", (720, 1280, 81), 75_600, 6523.4),
    ("Wan2.2-T2V-A14B", (480, 832, 81), 32_760, 1678.4),
    ("Wan2.2-T2V-A14B", (720, 1280, 81), 75_600, 6523.4),
    ("Wan2.2-TI2V-5B", (704, 1280, 121), 27_280, 517.0),
    ("Wan2.1-I2V-14B-480P", (480, 832, 81), 32_760, 1686.4),
    ("Wan2.1-I2V-14B-720P", (720, 1280, 81), 75_600, 6540.5),
    ("Wan2.2-I2V-A14B", (720, 1280, 81), 75_600, 6523.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "tokens", "tflop"), FORWARDS)
def test_forward_flops_of_each_family(
    name: str, size: tuple[int, int, int], tokens: int, tflop: float
) -> None:
    height, width, frames = size
    path = f"Wan-AI/{name}-Diffusers"
    cfg = GeneratorConfig(
        path, height=height, width=width, num_frames=frames, lora=None
    )
    with Meter(H100.rates) as meter:
        wan = MetaWan(cfg, meter)
        assert wan.tokens == tokens
        flops = wan.forward(1, grad=False).flops
    assert flops == pytest.approx(tflop * 1e12, rel=0.01)


def test_ranks_that_share_a_sample_share_its_activations() -> None:
    """Two ranks to a sample: half of a rank's FLOPs, seconds and bytes."""
    assert _shared(Cost(8.0, 6.0, 4.0), 2) == Cost(4.0, 3.0, 2.0)


@pytest.mark.parametrize("offload", [True, False])
def test_frozen_transformer_is_in_memory_while_it_is_used(*, offload: bool) -> None:
    """With offload it is a part of the rollout's peak and of the host, else it is permanent."""
    experts = ExpertsConfig(offload=offload)
    cfg = GeneratorConfig("Wan-AI/Wan2.2-T2V-A14B-Diffusers", experts=experts)
    wan = SimpleNamespace(cfg=cfg, frozen=torch.nn.Linear(10, 10, bias=False))
    plan = Plan(H100, "update", 1, 0.0)
    cost = _with_frozen(plan, wan, Cost(1.0, 1.0, 50.0))
    parts = [(part.bytes, part.temporary) for part in plan.parts]
    if offload:
        assert (cost.peak, parts, plan.host[0].bytes) == (450.0, [], 400)
    else:
        assert (cost.peak, parts, plan.host) == (50.0, [(400, False)], [])


@pytest.mark.parametrize(
    ("members", "tail", "want"), [(4, 1, 5.8), (4, 3, 13.8), (8, 1, 9.8), (8, 3, 25.8)]
)
def test_forwards_of_a_flow_map_by_hand(members: int, tail: int, want: float) -> None:
    """MEAN over k = 0..5 of [k > 0] + 1 + G m; Wan takes 107 and 207 for 4 and 8 members."""
    recipe = ROOT / "configs" / "wan" / "grpo.yaml"
    layer = ROOT / "configs" / "wan" / "models" / "anyflow.yaml"
    overrides = [f"generator.sampler.tail_steps={tail}", "prompts=x"]
    how = load(GrpoRun, [recipe, layer], overrides).generator.sampler
    assert samples_per_rollout(how, members) == pytest.approx(
        5 / 6 + 1 + members * tail
    )
    assert round(samples_per_rollout(how, members), 1) == want
    paper = ["generator.sampler.tail_steps=null", "prompts=x"]
    wan = load(GrpoRun, recipe, paper).generator.sampler
    assert samples_per_rollout(wan, members) == {4: 107, 8: 207}[members]


@pytest.mark.slow
def test_flow_map_is_a_wan_with_a_second_embedder_of_time() -> None:
    """256 -> 1536 -> 1536 with biases: 2,755,584 parameters more."""
    wan = MetaWan(GeneratorConfig(WAN))
    anyflow = MetaWan(GeneratorConfig("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers"))
    more = (256 + 1) * 1536 + (1536 + 1) * 1536
    assert anyflow.family.flow_map
    found = sizes_of(anyflow.transformer).parameters
    assert found == sizes_of(wan.transformer).parameters + more
    assert sizes_of(anyflow.module).trained == sizes_of(wan.module).trained


@pytest.mark.slow
def test_wan_22_components_have_published_parameters() -> None:
    """Parameters of the published checkpoints, and adapters of rank 128 on the six linears."""
    ti2v = MetaWan(
        GeneratorConfig("Wan-AI/Wan2.2-TI2V-5B-Diffusers", height=704, width=1280)
    )
    assert sizes_of(ti2v.transformer).parameters == 4_999_787_712
    assert sizes_of(ti2v.vae).parameters == 704_688_668
    assert sizes_of(ti2v.module).trained == 322_437_120
    assert ti2v.frozen is None
    a14b = MetaWan(GeneratorConfig("Wan-AI/Wan2.2-T2V-A14B-Diffusers"))
    for expert in (a14b.transformer, a14b.frozen):
        assert sizes_of(expert).parameters == 14_288_491_584
        # 29.2 M of them rest in fp32
        assert sizes_of(expert).bytes == 28_635_351_168
    assert sizes_of(a14b.module).trained == 613_416_960


@pytest.mark.slow
def test_image_models_have_published_parameters() -> None:
    for name, count in (
        ("Wan2.1-I2V-14B-480P", 16_394_878_784),
        ("Wan2.2-I2V-A14B", 14_288_901_184),
    ):
        wan = MetaWan(GeneratorConfig(f"Wan-AI/{name}-Diffusers"))
        assert wan.family.needs_image
        assert sizes_of(wan.transformer).parameters == count


@pytest.mark.slow
def test_wan_14b_flops_match_published_count() -> None:
    """98 TFLOP a forward at 240 x 416 x 33, published count."""
    cfg = GeneratorConfig(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        height=240,
        width=416,
        num_frames=33,
        lora=None,
    )
    with Meter(H100.rates) as meter:
        wan = MetaWan(cfg, meter)
        assert sizes_of(wan.transformer).parameters == pytest.approx(14.29e9, rel=0.001)
        flops = wan.forward(1, grad=False).flops
    assert flops == pytest.approx(
        flops_by_hand(3_510, d=5120, wide=13_824, layers=40), rel=0.005
    )
    assert flops == pytest.approx(98e12, rel=0.01)


def test_wan_components_have_published_parameters() -> None:
    wan = MetaWan(GeneratorConfig(WAN))
    assert wan.latent_shape == (16, 21, 60, 104)
    lora = wan.cfg.lora
    each = 8 * lora.rank * (1536 + 1536) + 2 * lora.rank * (1536 + 8960)
    assert sizes_of(wan.module).trained == 30 * each  # 175 M
    assert sizes_of(wan.vae).parameters == pytest.approx(127e6, rel=0.01)
    assert sizes_of(wan.text_encoder).parameters == pytest.approx(5.68e9, rel=0.01)


def test_reward_model_read_cost_matches_count_by_hand() -> None:
    """Five seconds at two frames a second are ten frames in five patches of time.

    1,400 tokens take 24 TFLOP by 2 N L.
    """
    lengths = lengths_of(VideoSettings(), frames=81, fps=16.0, height=480, width=832)
    assert (lengths.grid, lengths.video) == ((5, 20, 36), 5 * 10 * 18)
    lengths = replace(lengths, chain=0)
    with Meter(H100.rates) as meter:
        model = MetaRewardModel(
            "Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16", meter=meter
        )
        cost = model.read(1, lengths, grad=False)
    places = lengths.video + lengths.prompt
    inside = (
        sizes_of(model.model.backbone.model.language_model).parameters - 151_936 * 4096
    )
    eye = sizes_of(model.model.backbone.model.visual).parameters
    by_hand = (
        2 * inside * places
        + 36 * 2 * places**2 * 4096
        + 2 * eye * math.prod(lengths.grid)
    )
    assert cost.flops == pytest.approx(by_hand, rel=0.05)


def test_qwen3_vl_8b_weight_names_match_public_index() -> None:
    """The index of nvidia/Cosmos-Reason2-8B, trained from Qwen3-VL-8B, has 67,748 characters.

    An index has no shapes; tests/rm/test_full_size.py counts the parameters.
    """
    model = MetaRewardModel("Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16")
    names = [name for name, _ in model.model.backbone.named_parameters()]
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


def test_training_parts_by_zero_stage() -> None:
    """1,000 trained fp32 parameters among 3,000 bf16 ones, four ranks."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1000))])
    module.append(
        torch.nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16), requires_grad=False)
    )
    # weights, gradients, optimizer, reduce bucket of 50 fp32 numbers, a step
    want = {
        0: (10_000, 4_000, 8_000, 0, 12_000),
        1: (10_000, 4_000, 3_000, 200, 3_000),
        2: (10_000, 1_000, 3_000, 200, 3_000),
        3: (2_500, 1_000, 3_000, 200, 3_000),
    }
    for stage, expected in want.items():
        parts = training_parts(
            "m", sizes_of(module), zero_stage=stage, ranks=4, bucket=50
        )
        assert tuple(part.bytes for part in parts) == expected


def test_plan_peak_adds_only_the_largest_temporary_part() -> None:
    parts = [
        Part("a", 10.0),
        Part("b", 5.0),
        Part("c", 7.0, temporary=True),
        Part("d", 9.0, temporary=True),
    ]
    phases = [Phase("x", 1e12, 2.0), Phase("y", 1e12, 3.0)]
    plan = Plan(H100, "update", 720, 0.0, parts, phases)
    assert plan.peak == 24.0 + RESERVE
    # 720 times 5 seconds on 8 ranks
    count = next(line for line in lines_of(plan) if "720" in line)
    assert "1.0 hours, 8 GPU hours" in count


def test_plan_too_large_lists_largest_parts_first() -> None:
    """3 GiB stay, 2 and 16 are temporary: with 4 in reserve 23 GiB."""
    parts = [
        Part("a", 3 * GIB),
        Part("b", 16 * GIB, temporary=True),
        Part("c", 2 * GIB, temporary=True),
    ]
    plan = Plan(H100, "update", 720, 0.0, parts, [Phase("x", 1e12, 2.0)])
    small = Where(replace(DEVICES["h100"], memory=10 * GIB), 2)
    lines = lines_of(replace(plan, where=small))
    assert "23.0" in lines[-7]
    assert "13.0" in lines[-7]
    parts_of_plan = [line.split() for line in lines[-5:-2]]
    assert parts_of_plan == [["16.0", "b"], ["3.0", "a"], ["2.0", "c"]]
    for key in ("zero_stage", "rollout_batch", "decode_batch", "micro_batch"):
        assert key in lines[-2]
    assert lines[-1].endswith("2 x h100, h200, a100, 4090.")

    # Larger devices are named, and a plan that fits names none.
    larger = replace(plan, parts=[Part("a", 100 * GIB)])
    assert lines_of(larger)[-1].endswith("8 x h200.")
    largest = replace(plan, parts=[Part("a", 200 * GIB)])
    assert "None" in lines_of(largest)[-1]
    assert "fits:" in lines_of(plan)[-1]
    assert "23.0" in lines_of(plan)[-1]


def test_missing_reward_model_takes_the_size_in_its_name() -> None:
    for name, size in (
        ("models/Qwen3-VL-2B-Instruct", "2B"),
        ("runs/descore_4b/final", "4B"),
        ("runs/8b/from_2b", "2B"),
        ("nope", "8B"),
        ("models/14b", "8B"),
        ("models/x2bit", "8B"),
    ):
        assert closest_qwen3_vl(name) == f"Qwen/Qwen3-VL-{size}-Instruct"
    model = MetaRewardModel("nope_2b", dtype="bfloat16")
    assert sizes_of(model.model).parameters == pytest.approx(2.13e9, rel=0.01)


@pytest.mark.parametrize(
    ("schema", "name", "words", "key"),
    [
        pytest.param(
            ColdStartRun, "cold_start", ["base=nope"], "base", marks=pytest.mark.slow
        ),
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
def test_assumed_model_is_printed_at_the_top_and_after_the_total(
    schema: type, name: str, words: list[str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model of the embedded world stands for the 8B, which would take half a minute."""
    tiny = str(ROOT / "assets" / "shapes" / "qwen")
    monkeypatch.setattr(
        "launch.planning.known_models.closest_qwen3_vl", lambda name: tiny
    )
    monkeypatch.chdir(ROOT)
    cfg = load(schema, ROOT / "configs" / "shapes" / f"{name}.yaml", words)
    plan = (plan_grpo if schema is GrpoRun else plan_reward_model)(cfg, H100)
    lines = lines_of(plan)
    note = lines[1]
    assert key in note
    assert "nope" in note
    assert tiny in note
    assert lines.count(note) == 2
    before_last = lines[lines.index(note, 2) - 1].split()
    # the sum, or the hours of the whole run below it
    assert before_last[0] in ("together", "the")
    there = load(
        schema,
        ROOT / "configs" / "shapes" / f"{name}.yaml",
        [f"{words[0].partition('=')[0]}={tiny}"],
    )
    assert (plan_grpo if schema is GrpoRun else plan_reward_model)(
        there, H100
    ).assumed == []


def test_missing_inputs_lists_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    wan = {
        name: ROOT / "configs" / "wan" / f"{name}.yaml"
        for name in ("grpo", "dpo", "cold_start", "sample")
    }

    def keys(schema: type, name: str, *words: str, planned: bool = True) -> list[str]:
        lines = missing_inputs(load(schema, wan[name], words), planned=planned)
        return [line.partition(":")[0] for line in lines]

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


def test_parse_where() -> None:
    assert parse_where("8xH100@0.4") == Where(DEVICES["h100"], 8, 0.4)
    assert parse_where("a100") == Where(DEVICES["a100"], 1, 1.0)
    for wrong in ("8xh999", "0xh100", "8h100", "h100@2", ""):
        with pytest.raises(SystemExit) as ended:
            parse_where(wrong)
        assert ended.value.code == 2


@pytest.mark.parametrize(("schema", "name"), [(GrpoRun, "grpo"), (ScoreRun, "score")])
def test_unknown_device_exits_before_printing(
    schema: type, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", f"{ROOT}/configs/shapes/{name}.yaml", "--dry-run", "8xh900"]
    with pytest.raises(SystemExit) as ended:
        read_command(schema, words, description=name)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "8xh900" in output.err


def test_dry_run_needs_no_required_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/shapes/score.yaml"]
    with pytest.raises(SystemExit) as ended:
        score.main([*words, "--dry-run"])
    assert ended.value.code == 0
    assert "ScoreRun" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        score.main(words)
    assert ended.value.code == 2
    assert "--prompts" in capsys.readouterr().err


# The paper's 16 steps with the exact module.
PLAIN = [
    "generator.lora.compute_dtype=float32",
    "generator.sampler.merge_adapter=false",
    "generator.sampler.tail_solver=euler",
    "generator.sampler.tail_steps=null",
]


@pytest.mark.long
def test_grpo_recipe_cost_matches_longcat() -> None:
    """2,119 PFLOP an update on Wan 1.3B, and 1.304 s a forward on an H100.

    64 groups of 117 forwards of 283 TFLOP; the adapter's own products come on top here. The
    seconds are the sum of a forward's kernels by another script.
    """
    cfg = load(GrpoRun, ROOT / "configs" / "wan" / "grpo.yaml", PLAIN)
    plan = plan_grpo(cfg, H100)
    found = {phase.name: phase for phase in plan.phases}
    transformer = found["rollout"].flops + found["update"].flops
    assert 8 * transformer == pytest.approx(2_119e15, rel=0.15)
    assert found["rollout"].seconds == pytest.approx(8 * 107 * 1.304, rel=0.03)
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
def test_forward_objective_cost_by_hand() -> None:
    """A group of 16: 12 guided steps, and 4 levels of forward, backward and the old policy's.

    The recomputed forward of checkpointing makes 4 of the 3 with gradient.
    """
    files = [
        ROOT / "configs" / name
        for name in ("wan/grpo.yaml", "sisters/diffusion_nft.yaml")
    ]
    cfg = load(GrpoRun, files)
    plan = plan_grpo(cfg, H100)
    found = {phase.name: phase for phase in plan.phases}
    want = 16 * 12 * 2 / (16 * 4 * (4 + 1) * 2)
    assert found["rollout"].flops / found["update"].flops == pytest.approx(
        want, rel=0.1
    )
    trained = next(part for part in plan.parts if part.name == "old policy")
    # fp32 copies of 175 million weights
    assert trained.bytes == pytest.approx(4 * 174_981_120)
    assert any("4,096 forwards with a backward as two" in fact for fact in plan.facts)


@pytest.mark.long
def test_cold_start_8b_cost_by_hand() -> None:
    cfg = load(ColdStartRun, ROOT / "configs" / "wan" / "cold_start.yaml")
    short = Lengths((5, 20, 36), 900, prompt=200, chain=200)
    plan = plan_reward_model(cfg, H100, short)
    weights = next(part for part in plan.parts if part.name == "reward model: weights")
    assert weights.bytes == pytest.approx(
        2 * 8.767e9 + 2 * 0.175e9, rel=0.02
    )  # and LoRA of rank 64
    # a frozen linear costs its forward, its recomputation and the gradient of its input
    # half of the chains of thought are dropped
    once = 2 * 6.95e9 * (short.total - 100) + 2 * 0.576e9 * 3600
    assert 8 * plan.phases[0].flops == pytest.approx(32 * 2 * 3 * once, rel=0.15)
    assert plan.peak < 79 * GIB


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["grpo", "dpo", "pairs", "cold_start", "dual_rl", "sample"]
)
def test_dry_run_of_every_program_prints_a_plan(name: str, tmp_path: Path) -> None:
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
        assert "SampleRun" in done.stdout
    else:
        assert "A100" in done.stdout
    assert not (ROOT / "r").exists()


def test_flops_of_a_small_decoder_are_counted_by_hand() -> None:
    """TAESD's widths: products of 9 x 64 x 64 a place, at 1, 4, 16 and 64 places a latent's."""
    blocks = 9 * (1 + 4 + 16) + 3 * 64
    between = 4 + 16 + 64
    ends = 16 / 64 + 64 * 12 / 64
    products = (blocks + between + ends) * 9 * 64 * 64
    cfg = GeneratorConfig(
        path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        vae_dtype="bfloat16",
        scoring_decoder="not/a/folder",
    )
    with Meter(H100.rates) as meter:
        cost = MetaWan(cfg, meter).decode(1)
    assert cost.flops == pytest.approx(2 * products * 21 * 60 * 104, rel=1e-6)
