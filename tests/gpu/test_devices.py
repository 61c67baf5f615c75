"""What only a GPU can show: streams, memory that runs out, kernels that repeat their bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from alignment.rewards.brightness import Brightness
from alignment.rewards.errors import NamedReward
from alignment.scoring import Scorer
from alignment.self_checks import first_ratio
from alignment.timing import PhaseTimer
from common.memory import AdaptiveBatcher, peak_memory
from common.types import Score
from generator.stock_check import stock_gap
from generator.wan import WanGenerator
from tests.tiny import tiny_generator

PROMPT = "a red circle"


class Placed(Brightness):
    """Records the GPU and the stream that it is called on."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.seen: list[tuple[int, int]] = []

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        assert threading.current_thread() is not threading.main_thread()
        if not self.is_cuda:
            return super().score(video_BTYXC, prompts, fps=fps)
        stream = torch.cuda.current_stream()
        self.seen.append((torch.cuda.current_device(), stream.cuda_stream))
        # A user's reward, which names no index.
        brighter = video_BTYXC.cuda().float().mean(dim=(1, 2, 3, 4)).cpu() / 255
        return Score(brighter)


@pytest.fixture
def last_device(device: torch.device) -> Iterator[torch.device]:
    """The last GPU as this process's current one: another than 0 where there are several."""
    if device.type != "cuda":
        yield device
        return
    before = torch.cuda.current_device()
    last = torch.cuda.device_count() - 1
    torch.cuda.set_device(last)
    yield torch.device("cuda", last)
    torch.cuda.set_device(before)


def test_overlapped_scoring_runs_on_the_rank_s_gpu_on_one_other_stream(
    last_device: torch.device,
) -> None:
    reward = Placed(last_device)
    video = torch.full((2, 3, 4, 4, 3), 51, dtype=torch.uint8)
    # two steps of two groups
    for _ in range(2):
        scorer = Scorer(
            {"bright": NamedReward("bright", reward)},
            fps=8.0,
            group_size=2,
            groups=2,
            videos_per_call=4,
            timer=PhaseTimer(),
            overlap=True,
        )
        with scorer:
            scorer.add(video, [PROMPT] * 2)
            scorer.add(video, [PROMPT] * 2)
            found = scorer.scores()
        assert found["bright"].value_B.tolist() == pytest.approx([0.2] * 4)
    if last_device.type != "cuda":
        pytest.skip("streams are there on CUDA only")
    assert len(reward.seen) == 4
    assert set(reward.seen) == {reward.seen[0]}
    device, stream = reward.seen[0]
    assert device == last_device.index
    assert stream != torch.cuda.current_stream().cuda_stream


def test_chunk_is_halved_until_it_fits_the_memory(cuda: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(cuda)
    # One item takes a sixth of the free memory, so that eight do not fit.
    numbers = free // 6 // 4
    batcher = AdaptiveBatcher(8, what="items")

    def work(items: torch.Tensor) -> torch.Tensor:
        filled = torch.ones((len(items), numbers), device=cuda)
        return filled[:, 0].cpu() * items

    result = batcher.over(work, torch.arange(8.0))
    assert result.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batcher.size in (2, 4)
    torch.cuda.empty_cache()


def test_peak_memory_counts_tensors_of_the_gpu(cuda: torch.device) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**30
    kept = torch.zeros(2**28, device=cuda)
    assert peak_memory()["memory/peak_gb"] - before == pytest.approx(1.0, abs=0.01)
    del kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratios_are_1(device: torch.device, folder: Path, dtype: str) -> None:
    generator = tiny_generator(folder, device=device, dtype=dtype)
    finding = first_ratio(generator, PROMPT, dtype=dtype, group_size=4)
    assert finding.ok, finding.message


def test_sampler_equals_the_stock_pipeline(device: torch.device, folder: Path) -> None:
    generator = tiny_generator(folder, device=device)
    assert stock_gap(generator, PROMPT) < 1e-4


def test_rollout_repeats_itself(device: torch.device, folder: Path) -> None:
    """The noise comes from the CPU; kernels may add in another order."""
    generator = tiny_generator(folder, device=device)
    groups = [generator.rollout([PROMPT], group_size=4, seeds=[3])[0] for _ in range(2)]
    on_cpu = tiny_generator(folder).rollout([PROMPT], group_size=4, seeds=[3])[0]
    first, second = (group.clean_GCFHW.cpu() for group in groups)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, on_cpu.clean_GCFHW, rtol=1e-2, atol=1e-2)


def velocity_and_gradient(generator: WanGenerator) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided velocity at a fixed latent, and the gradient of its mean square."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn((2, *generator.latent_shape), generator=source)
    sigma = torch.tensor([0.9, 0.4])
    velocity = generator.velocity(x, sigma, [PROMPT] * 2, guidance_scale=3.0)
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(velocity.square().mean(), trained)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return velocity.detach().cpu(), flat.cpu()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradient_equal_the_cpu_s(
    device: torch.device, folder: Path, dtype: str
) -> None:
    # Wan's smallest differences in bfloat16 are 2^-8.
    limit = 1e-3 if dtype == "float32" else 5e-2
    ours = velocity_and_gradient(tiny_generator(folder, device=device, dtype=dtype))
    wanted = velocity_and_gradient(tiny_generator(folder, dtype=dtype))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < limit


def test_compiled_blocks_give_the_forward_and_gradient_of_eager_ones(
    device: torch.device, folder: Path
) -> None:
    eager = velocity_and_gradient(tiny_generator(folder, device=device))
    compiled = velocity_and_gradient(
        tiny_generator(folder, device=device, compile=True)
    )
    for mine, theirs in zip(compiled, eager, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-3
