"""Measure what kernels of this device reach, by the names of `launch.planning.roofline.Rates`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv3d, scaled_dot_product_attention

# Backward passes have five products where the forward has two.
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class RateSizes:
    """Sizes of the kernels; by default those of Wan 2.1 1.3B at 480x832x81.

    gemm       rows and columns of square matrices.
    heads, tokens, head_dim  of attention in bfloat16.
    math_tokens  of attention as two products in fp32, which stores all scores.
    channels, frames, height, width  of a convolution with a kernel of 3 x 3 x 3.
    copied     numbers of a copy.
    """

    gemm: int = 8192
    heads: int = 12
    tokens: int = 32760
    head_dim: int = 128
    math_tokens: int = 4096
    channels: int = 192
    frames: int = 4
    height: int = 240
    width: int = 416
    copied: int = 1 << 28


@dataclass(frozen=True)
class MeasuredRates:
    """Rates by name, and why others have none here."""

    rates: dict[str, float]
    left_out: dict[str, str]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    function: Callable[[], object], device: torch.device, *, repeats: int = 3
) -> float:
    """Return the median seconds of a call, after a first call that does not count."""
    function()
    wait_for(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextmanager
def tensor_float32(*, allowed: bool) -> Iterator[None]:
    """Inside, fp32 products and convolutions may use TF32, or may not."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


def gemm_rate(
    sizes: RateSizes, device: torch.device, dtype: torch.dtype, *, tf32: bool = False
) -> float:
    """FLOP/s of a square matrix product, 2 n^3."""
    n = sizes.gemm
    a, b = torch.randn((2, n, n), device=device, dtype=dtype)
    with tensor_float32(allowed=tf32):
        return 2 * n**3 / seconds_of(lambda: a @ b, device)


def conv_rate(
    sizes: RateSizes, device: torch.device, dtype: torch.dtype, *, tf32: bool = False
) -> float:
    """FLOP/s of a padded convolution, 2 * 27 C^2 for each place."""
    c = sizes.channels
    shape = (sizes.frames, sizes.height, sizes.width)
    x = torch.randn((1, c, *shape), device=device, dtype=dtype)
    kernel = torch.randn((c, c, 3, 3, 3), device=device, dtype=dtype)
    flops = 2 * 27 * c**2 * sizes.frames * sizes.height * sizes.width
    with tensor_float32(allowed=tf32):
        return flops / seconds_of(lambda: conv3d(x, kernel, padding=1), device)


def sdpa_rate(
    sizes: RateSizes,
    device: torch.device,
    kind: SDPBackend,
    *,
    backward: bool = False,
) -> float:
    """FLOP/s of a kernel of PyTorch's attention: 4 H L^2 D, and 2.5 times that backward."""
    is_math = kind == SDPBackend.MATH
    tokens = sizes.math_tokens if is_math else sizes.tokens
    dtype = torch.float32 if is_math else torch.bfloat16
    shape = (3, 1, sizes.heads, tokens, sizes.head_dim)
    query, key, value = torch.randn(shape, device=device, dtype=dtype)
    flops = 4 * sizes.heads * tokens**2 * sizes.head_dim
    with sdpa_kernel(kind), tensor_float32(allowed=False):
        forward = seconds_of(
            lambda: scaled_dot_product_attention(query, key, value), device
        )
        if not backward:
            return flops / forward

        # The backward alone is the difference from both.
        inputs = [x.requires_grad_() for x in (query, key, value)]

        def both() -> None:
            out = scaled_dot_product_attention(*inputs)
            torch.autograd.grad(out.sum(), inputs)

        seconds = seconds_of(both, device) - forward
        return BACKWARD_FLOPS * flops / seconds


def backend_rate(sizes: RateSizes, device: torch.device, name: str) -> float:
    """FLOP/s of one of diffusers' attention backends, forward. Raises ValueError without it."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        dispatch_attention_fn,
    )

    from generator.attention import require_backend

    require_backend("backend", name, device)
    shape = (3, 1, sizes.tokens, sizes.heads, sizes.head_dim)
    query, key, value = torch.randn(shape, device=device, dtype=torch.bfloat16)
    flops = 4 * sizes.heads * sizes.tokens**2 * sizes.head_dim
    backend = AttentionBackendName(name)
    return flops / seconds_of(
        lambda: dispatch_attention_fn(query, key, value, backend=backend), device
    )


def copy_rate(sizes: RateSizes, device: torch.device) -> float:
    """Bytes a second of a copy, which reads and writes each number."""
    source = torch.ones(sizes.copied, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / seconds_of(lambda: target.copy_(source), device)


def launch_seconds(device: torch.device, *, kernels: int = 1000) -> float:
    """Seconds of the shortest kernel, in a captured graph, where Python starts none of them.

    Raises ValueError for a device without graphs.
    """
    if device.type != "cuda":
        raise ValueError("only CUDA captures graphs")
    x = torch.zeros(1, device=device)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    return seconds_of(graph.replay, device) / kernels


def first_of(sizes: RateSizes, device: torch.device, *names: str) -> float:
    """`backend_rate` of the first of several backends that runs; ValueError if none does."""
    problems = []
    for name in names:
        try:
            return backend_rate(sizes, device, name)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            problems.append(f"{name}: {error}")
    raise ValueError("; ".join(problems))


def measure_rates(sizes: RateSizes, device: torch.device) -> MeasuredRates:
    """Measure every rate that this device has."""
    half, full = torch.bfloat16, torch.float32
    flash = SDPBackend.FLASH_ATTENTION
    cudnn = SDPBackend.CUDNN_ATTENTION
    efficient = SDPBackend.EFFICIENT_ATTENTION
    measures: dict[str, Callable[[], float]] = {
        "gemm_bf16": lambda: gemm_rate(sizes, device, half),
        "gemm_fp32": lambda: gemm_rate(sizes, device, full),
        "gemm_tf32": lambda: gemm_rate(sizes, device, full, tf32=True),
        "conv_bf16": lambda: conv_rate(sizes, device, half),
        "conv_fp32": lambda: conv_rate(sizes, device, full),
        "conv_tf32": lambda: conv_rate(sizes, device, full, tf32=True),
        "attention_flash": lambda: sdpa_rate(sizes, device, flash),
        "attention_cudnn": lambda: sdpa_rate(sizes, device, cudnn),
        "attention_efficient": lambda: sdpa_rate(sizes, device, efficient),
        "attention_math": lambda: sdpa_rate(sizes, device, SDPBackend.MATH),
        "attention_flash_backward": lambda: sdpa_rate(
            sizes, device, flash, backward=True
        ),
        "attention_fast_backward": lambda: sdpa_rate(
            sizes, device, cudnn, backward=True
        ),
        "attention_efficient_backward": lambda: sdpa_rate(
            sizes, device, efficient, backward=True
        ),
        "attention_fa3": lambda: first_of(sizes, device, "_flash_3_hub", "_flash_3"),
        "attention_sage": lambda: first_of(sizes, device, "sage", "sage_hub"),
        "bytes": lambda: copy_rate(sizes, device),
        "launch": lambda: launch_seconds(device),
    }

    # A kernel that this device lacks has no rate; all others do.
    rates = {}
    left_out = {}
    for name, measure in measures.items():
        try:
            rates[name] = measure()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            left_out[name] = first_line(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return MeasuredRates(rates, left_out)


def first_line(error: Exception) -> str:
    """Say in a line what an error is."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers of some tensors in a row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
