"""The simulated device: what it refuses, what it knows, and what it counts."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

from launch.planning.roofline import RATES, Rates
from launch.rehearsal.cuda_rules import SimulatedCudaError
from launch.rehearsal.device import SimulatedGpu
from launch.rehearsal.ledger import LOADING
from launch.rehearsal.patches import as_on_cuda

GPU = torch.device("meta")
# A FLOP, a byte and a launch take one second each.
UNIT = Rates(**{field.name: 1.0 for field in fields(Rates)})
MIB = 2**20


@pytest.fixture
def gpu():
    simulated = SimulatedGpu(UNIT)
    with as_on_cuda(simulated), simulated:
        yield simulated


def big(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without numbers."""
    return torch.empty(*shape, dtype=dtype, device=GPU)


# ------------------------------------------------------------------ refusals


def a_cpu_tensor_in_a_sum():
    return torch.ones(3, device=GPU) + torch.ones(3)


def a_cpu_mask():
    return torch.ones(3, device=GPU).masked_fill(torch.ones(3, dtype=torch.bool), 0.0)


def a_cpu_table_with_a_gpu_index():
    return torch.ones(3)[torch.zeros(2, dtype=torch.long, device=GPU)]


def a_cpu_generator():
    return torch.randn(3, generator=torch.Generator(), device=GPU)


def two_dtypes_in_a_product():
    return torch.ones(2, 2, device=GPU) @ torch.ones(2, 2, device=GPU).bfloat16()


def fp32_weights_for_half_inputs():
    return nn.Linear(2, 2, device=GPU)(torch.ones(1, 2, device=GPU).bfloat16())


def an_fp32_norm_of_half_inputs():
    return nn.LayerNorm(2, device=GPU)(torch.ones(1, 2, device=GPU).bfloat16())


def two_dtypes_in_attention():
    query = torch.ones(1, 1, 2, 8, device=GPU)
    key = query.bfloat16()
    return nn.functional.scaled_dot_product_attention(query, key, key)


def a_cpu_mask_of_attention():
    query = torch.ones(1, 1, 2, 8, device=GPU)
    mask = torch.ones(2, 2, dtype=torch.bool)
    return nn.functional.scaled_dot_product_attention(query, query, query, mask)


REFUSED = [
    a_cpu_tensor_in_a_sum,
    a_cpu_mask,
    a_cpu_table_with_a_gpu_index,
    a_cpu_generator,
    two_dtypes_in_a_product,
    fp32_weights_for_half_inputs,
    an_fp32_norm_of_half_inputs,
    two_dtypes_in_attention,
    a_cpu_mask_of_attention,
]


@pytest.mark.parametrize("mistake", REFUSED, ids=lambda mistake: mistake.__name__)
def test_what_cuda_refuses_is_refused(gpu, mistake):
    with pytest.raises(SimulatedCudaError):
        mistake()
    assert len(gpu.faults) == 1


def test_a_refusal_names_the_line_of_the_project(gpu):
    from generator.flow import euler_step

    with pytest.raises(SimulatedCudaError, match=r"^generator/flow\.py:\d+: aten\.sub"):
        euler_step(torch.ones(1, 2), torch.ones(1, 2, device=GPU), 1.0, 0.5)


def test_what_cuda_allows_is_allowed(gpu):
    x = torch.ones(3, device=GPU)
    assert (x * torch.tensor(2.0)).is_meta  # a single number of the CPU
    assert x[torch.tensor([0, 2])].shape == (2,)  # indices of the CPU
    assert not gpu.faults


# ------------------------------------------------------------------ numbers


def test_small_tensors_have_their_numbers(gpu):
    mask = torch.arange(5, device=GPU) < torch.tensor([3], device=GPU)
    assert mask.sum().item() == 3
    assert mask.nonzero().shape == (3, 1)
    assert torch.tensor([[1, 2]], device=GPU).tolist() == [[1, 2]]
    assert not gpu.ledger.now.guesses


def test_writing_unknown_numbers_makes_a_tensor_unknown(gpu):
    x = torch.zeros(4, device=GPU)
    unknown = big(1 << 22).sum()
    x[1] = unknown
    assert gpu.twins.real(x) is None


def test_a_reading_of_unknown_numbers_is_a_guess(gpu):
    product = big(1 << 11, 1 << 11) @ big(1 << 11, 1 << 11)
    assert product.sum().item() == 0.5
    assert product[0, :3].cpu().tolist() == [0.0, 0.5, 1.0]
    assert sum(gpu.ledger.now.guesses.values()) == 2


def test_unknown_numbers_are_expected_to_be_finite(gpu):
    x = big(1 << 11, 1 << 11) * 2
    assert not x.isnan().any().item()
    assert x.isfinite().all().item()
    assert not torch.isinf(x.amax()).item()
    assert not gpu.ledger.now.guesses


def test_with_everything_a_model_computes_the_numbers_of_the_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    x = torch.randn(4, 8)
    model(x).square().mean().backward()
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    with SimulatedGpu(RATES["h100"], everything=True) as gpu:
        moved = model.to(GPU)
        loss = moved(x.to(GPU)).square().mean()
        loss.backward()
        found = moved[0].weight.grad.cpu()
    assert gpu.ledger.now.guesses.total() == 0
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ counts


def test_peak_is_that_of_tensors_alive_at_the_same_time(gpu):
    first = big(MIB)  # 4 MiB
    second = big(MIB)
    del first
    third = big(2 * MIB)
    assert gpu.ledger.live == 12 * MIB
    assert gpu.ledger.phases[LOADING].peak == 12 * MIB
    del second, third
    gpu.ledger.enter("later")
    assert gpu.ledger.phases["later"].peak == 0


def test_a_view_takes_no_memory_and_a_small_tensor_takes_a_block(gpu):
    x = torch.ones(1, device=GPU)
    assert x.view(1, 1).is_meta
    assert gpu.ledger.live == 512


def test_waits_are_counted_where_python_waits(gpu):
    x = torch.ones(3, device=GPU)
    before = gpu.ledger.now.waits.total()
    x.sum().item()
    x.cpu()
    torch.ones(3).to(GPU)
    torch.tensor([1], device=GPU)
    torch.ones(3).to(GPU, non_blocking=True)
    assert gpu.ledger.now.waits.total() - before == 4


def test_traffic_is_counted_in_bytes(gpu):
    x = torch.ones(1000).to(GPU)
    x.bfloat16().cpu()
    assert gpu.ledger.now.h2d.total() == 4000
    assert gpu.ledger.now.d2h.total() == 2000
    assert gpu.ledger.now.casts == {"torch.float32->torch.bfloat16": 6000}


def test_a_product_takes_its_flops_and_a_sum_its_bytes(gpu):
    a = big(4, 8)
    b = big(8, 16)
    gpu.ledger.enter("product")
    product = a @ b
    assert gpu.ledger.now.seconds == {"gemm_fp32": 2 * 4 * 8 * 16}
    gpu.ledger.enter("sum")
    product + product
    # Reads the same tensor twice and writes a third: 3 x 4 x 64 bytes.
    assert gpu.ledger.now.seconds == {"add": 3 * 4 * 64}


def test_an_embedding_reads_the_rows_that_it_returns(gpu):
    table = big(1000, 8)
    ids = torch.zeros(2, dtype=torch.long, device=GPU)
    gpu.ledger.enter("lookup")
    nn.functional.embedding(ids, table)
    # 2 rows of 8 numbers read and written, and two ids of 8 bytes.
    assert gpu.ledger.now.seconds == {"embedding": 2 * 64 + 16}


@pytest.mark.parametrize(
    ("mask", "causal", "kind", "share"),
    [
        (False, False, "attention_flash", 1.0),
        (False, True, "attention_flash", 0.5),
        (True, False, "attention_efficient", 1.0),
    ],
)
def test_attention_takes_the_kernel_that_cuda_would(gpu, mask, causal, kind, share):
    query = big(1, 2, 64, 128, dtype=torch.bfloat16)
    bias = torch.ones(64, 64, dtype=torch.bool, device=GPU) if mask else None
    gpu.ledger.enter("attention")
    nn.functional.scaled_dot_product_attention(
        query, query, query, bias, is_causal=causal
    )
    assert gpu.ledger.now.seconds[kind] == share * 4 * 2 * 64 * 64 * 128


def test_a_backward_of_attention_is_that_of_its_forward(gpu):
    query = big(1, 2, 64, 128, dtype=torch.bfloat16).requires_grad_()
    with gpu.attention_by("fa3"):
        result = nn.functional.scaled_dot_product_attention(query, query, query)
    gpu.ledger.enter("backward")
    result.sum().backward()
    flops = 2.5 * 4 * 2 * 64 * 64 * 128
    assert gpu.ledger.now.seconds["attention_fast_backward"] == flops


def test_tf32_has_another_rate_once_it_is_switched_on(gpu):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        big(4, 8) @ big(8, 16)
    finally:
        torch.set_float32_matmul_precision(before)
    assert "gemm_tf32" in gpu.ledger.now.seconds


def test_a_phase_that_starts_many_short_kernels_is_bound_by_python():
    gpu = SimulatedGpu(RATES["h100"])
    with gpu:
        x = torch.ones(4, device=GPU)
        gpu.ledger.enter("short")
        for _ in range(10):
            x = x + 1
    costs = gpu.ledger.phases["short"]
    assert costs.device_seconds == pytest.approx(10 * 5e-6)
    assert costs.total_seconds(18e-6) == pytest.approx(10 * 18e-6)


def test_a_compiled_region_reads_its_inputs_and_writes_its_result_once(gpu):
    module = nn.Sequential(nn.SiLU(), nn.SiLU())
    module.compile()
    x = big(1000)
    gpu.ledger.enter("compiled")
    with torch.no_grad():
        result = module(x)
    assert gpu.ledger.now.seconds == {"compiled pointwise": 8000.0}
    assert gpu.ledger.now.kernels.total() == 1
    assert result.shape == (1000,)


def some_tensors() -> list[torch.Tensor]:
    return [
        big(3, 4),
        big(4, 3).t(),
        big(4),
        big(2, 1, 4),
        big(3, 4, dtype=torch.bfloat16),
        torch.ones(3, 4, dtype=torch.long, device=GPU),
        big(()),
    ]


def test_quick_shapes_are_those_of_pytorch():
    from launch.rehearsal.quick_shapes import quick_result

    aten = torch.ops.aten
    checked = 0
    pairs = [(x, y) for x in some_tensors() for y in [*some_tensors(), 2.0, 3]]
    calls = [(aten.add.Tensor, pair) for pair in pairs]
    calls += [(aten.mul.Tensor, pair) for pair in pairs]
    calls += [(aten.silu.default, (x,)) for x in some_tensors()]
    calls += [(aten.mm.default, (big(3, 4), big(4, 5)))]
    calls += [(aten.addmm.default, (big(5), big(3, 4), big(4, 5)))]
    for func, args in calls:
        quick = quick_result(func, args, {})
        if quick is None:
            continue
        wanted = func(*args)
        assert (quick.shape, quick.dtype) == (wanted.shape, wanted.dtype)
        assert quick.stride() == wanted.stride()
        checked += 1
    assert checked > 20


def test_guessed_videos_differ_and_take_no_memory(gpu):
    import resource

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before = resident()
    parts = []
    for _ in range(4):
        video = big(1, 81, 480, 832, 3, dtype=torch.uint8)
        parts.append(video.cpu())
    together = torch.cat([torch.cat(parts[:2]), torch.cat(parts[2:])])
    # 4 videos of 97 MB, three times.
    assert resident() - before < 100
    assert together.shape == (4, 81, 480, 832, 3)
    assert len({bytes(video[0, 0].flatten().tolist()) for video in together}) == 4
    assert torch.equal(together[3, 0], parts[3][0, 0])
