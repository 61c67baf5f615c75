"""Seconds of a GPU kernel by its roofline: arithmetic, memory traffic or launch, the longest.

The rates are what kernels of these kinds reach and not what data sheets promise. They are
estimates from public measurements; a file of measured rates (`read_measured`) replaces them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Rates of a device. FLOP/s by kind of kernel, where a multiply-add is two.

    attention_flash      FlashAttention-2, which PyTorch's SDPA takes without a mask.
    attention_cudnn      cuDNN's fused attention.
    attention_fa3        FlashAttention-3, on Hopper.
    attention_sage       SageAttention, with int8 scores.
    attention_efficient  the memory-efficient kernel, which SDPA takes with a mask.
    attention_math       attention as two products, for fp32.
    attention_flash_backward, attention_fast_backward, attention_efficient_backward
                         backward passes, at 2.5 times the FLOPs of the forward; "fast" is that
                         of cuDNN and FlashAttention-3.
    gemm_bf16, gemm_fp32, gemm_tf32    matrix products.
    conv_bf16, conv_fp32, conv_tf32    convolutions.
    bytes                bytes a second from and to memory.
    launch               seconds of the shortest kernel.
    host                 seconds that Python needs to start a kernel, so that a token of an
                         eager model of 36 layers takes about 30 ms. A phase takes at least
                         its kernels times this, unless they are captured in a graph.
    """

    attention_flash: float
    attention_cudnn: float
    attention_fa3: float
    attention_sage: float
    attention_efficient: float
    attention_math: float
    attention_flash_backward: float
    attention_fast_backward: float
    attention_efficient_backward: float
    gemm_bf16: float
    gemm_fp32: float
    gemm_tf32: float
    conv_bf16: float
    conv_fp32: float
    conv_tf32: float
    bytes: float
    launch: float = 5e-6
    host: float = 15e-6


def _rates(**tera: float) -> Rates:
    """Make rates from TFLOP/s and TB/s."""
    return Rates(**{name: 1e12 * value for name, value in tera.items()})


_HOPPER = {
    "attention_flash": 370.0,
    "attention_cudnn": 600.0,
    "attention_fa3": 620.0,
    "attention_sage": 900.0,
    "attention_efficient": 170.0,
    "attention_math": 45.0,
    "attention_flash_backward": 330.0,
    "attention_fast_backward": 480.0,
    "attention_efficient_backward": 120.0,
    "gemm_bf16": 620.0,
    "gemm_fp32": 45.0,
    "gemm_tf32": 250.0,
    "conv_bf16": 200.0,
    "conv_fp32": 40.0,
    "conv_tf32": 120.0,
}
# A device without a kernel has the rate of the kernel that stands in for it.
RATES = {
    "h100": _rates(**_HOPPER, bytes=2.8),
    "h200": _rates(**_HOPPER, bytes=4.0),
    "a100": _rates(
        attention_flash=190.0,
        attention_cudnn=200.0,
        attention_fa3=190.0,
        attention_sage=250.0,
        attention_efficient=90.0,
        attention_math=17.0,
        attention_flash_backward=160.0,
        attention_fast_backward=160.0,
        attention_efficient_backward=65.0,
        gemm_bf16=240.0,
        gemm_fp32=17.0,
        gemm_tf32=110.0,
        conv_bf16=100.0,
        conv_fp32=15.0,
        conv_tf32=60.0,
        bytes=1.7,
    ),
    "4090": _rates(
        attention_flash=140.0,
        attention_cudnn=140.0,
        attention_fa3=140.0,
        attention_sage=280.0,
        attention_efficient=80.0,
        attention_math=50.0,
        attention_flash_backward=110.0,
        attention_fast_backward=110.0,
        attention_efficient_backward=55.0,
        gemm_bf16=150.0,
        gemm_fp32=50.0,
        gemm_tf32=70.0,
        conv_bf16=80.0,
        conv_fp32=35.0,
        conv_tf32=45.0,
        bytes=0.9,
    ),
}


def rates_of(device: str, measured: Path | None = None) -> Rates:
    """Rates of a device of `RATES`, with those of a file of `read_measured` put over them."""
    rates = RATES[device]
    if measured is None:
        return rates
    return dataclasses.replace(rates, **read_measured(measured, device))


def read_measured(file: Path, device: str) -> dict[str, float]:
    """Read measured rates: ``{"device": "h100", "rates": {"gemm_bf16": 6.1e14, ...}}``.

    Names and units are those of `Rates`; names may be left out. Raises ValueError, naming the file
    and the key, for anything else and for a file of another device.
    """
    from common.files import read_json

    record = read_json(file)
    keys = set(record) if isinstance(record, dict) else set()
    # `make gpu-check` adds what it has measured besides
    if keys - {"measured"} != {"device", "rates"}:
        raise ValueError(f'{file} must hold {{"device": ..., "rates": {{...}}}}')
    if record["device"] != device:
        raise ValueError(
            f"{file}: device is {record['device']!r}, want {device!r}: other rates"
        )
    if not isinstance(record["rates"], dict):
        raise ValueError(f"{file}: rates must be an object of numbers by name")

    # Every rate by itself, so that the message names the wrong one.
    known = {field.name for field in dataclasses.fields(Rates)}
    rates = {}
    for name, value in record["rates"].items():
        if name not in known:
            raise ValueError(
                f"{file}: rates.{name} is unknown; known are {', '.join(sorted(known))}"
            )
        rates[name] = _positive(value, f"{file}: rates.{name}")
    return rates


def _positive(value: Any, where: str) -> float:
    """Return a finite number above 0. Raises ValueError, with ``where``, for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where} must be a number above 0, got {value!r}")
    return float(value)


def kernel_seconds(
    kind: str | None,
    *,
    flops: float,
    bytes_moved: float,
    rates: Rates,
) -> float:
    """Seconds of a kernel: max(flops / rate of its kind, bytes / bandwidth, launch).

    It is the roofline of Williams, Waterman and Patterson (2009) with a floor. ``kind`` names a
    FLOP rate of `Rates`; None is a kernel that only moves bytes.
    """
    seconds = max(bytes_moved / rates.bytes, rates.launch)
    if kind is not None:
        seconds = max(seconds, flops / getattr(rates, kind))
    return seconds
