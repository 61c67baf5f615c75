"""Rooflines by hand, and files of measured rates."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from launch.planning.plan import DEVICES
from launch.planning.roofline import RATES, Rates, kernel_seconds, rates_of

ROUND = Rates(**{field.name: 1e12 for field in fields(Rates)})
ROUND = type(ROUND)(**{**ROUND.__dict__, "launch": 1e-6, "gemm_fp32": 1e10})


@pytest.mark.parametrize(
    ("kind", "flops", "moved", "seconds"),
    [
        ("gemm_bf16", 2e9, 1e6, 2e-3),  # arithmetic: 2e9 / 1e12
        ("gemm_fp32", 2e9, 1e6, 0.2),  # 2e9 / 1e10
        ("gemm_bf16", 2e9, 5e9, 5e-3),  # memory: 5e9 / 1e12
        (None, 7e20, 5e9, 5e-3),  # moves bytes only
        ("gemm_bf16", 10.0, 10.0, 1e-6),  # launch
    ],
)
def test_kernel_seconds_is_the_longest_of_three(kind, flops, moved, seconds):
    found = kernel_seconds(kind, flops=flops, bytes_moved=moved, rates=ROUND)
    assert found == pytest.approx(seconds)


def test_attention_of_wan_at_480x832x81_takes_its_published_time():
    # 32,760 tokens, 12 heads of 128, 30 layers: 4 L^2 D H a layer is 198 TFLOP.
    flops = 30 * 4 * 32760**2 * 128 * 12
    seconds = kernel_seconds(
        "attention_flash", flops=flops, bytes_moved=0.0, rates=RATES["h100"]
    )
    assert seconds == pytest.approx(0.5346, rel=1e-3)


def test_every_device_of_the_plan_has_rates():
    assert RATES.keys() == DEVICES.keys()


def write(folder: Path, record: object) -> Path:
    file = folder / "measured.json"
    file.write_text(json.dumps(record))
    return file


def test_measured_rates_replace_those_of_the_table(tmp_path):
    file = write(tmp_path, {"device": "h100", "rates": {"gemm_bf16": 5.0e14}})
    rates = rates_of("h100", file)
    assert rates.gemm_bf16 == 5.0e14
    assert rates.conv_tf32 == RATES["h100"].conv_tf32


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"device": "h100", "rates": {"gemm_bf17": 1.0}}, "gemm_bf17"),
        ({"device": "h100", "rates": {"bytes": -1.0}}, "rates.bytes"),
        ({"device": "h100", "rates": {"bytes": True}}, "rates.bytes"),
        ({"device": "a100", "rates": {}}, "a100"),
        ({"device": "h100"}, "measured.json"),
        ({"device": "h100", "rates": {}, "more": 1}, "measured.json"),
        ([1], "measured.json"),
    ],
)
def test_wrong_file_of_measured_rates_is_refused(tmp_path, record, named):
    with pytest.raises(ValueError, match=named):
        rates_of("h100", write(tmp_path, record))
