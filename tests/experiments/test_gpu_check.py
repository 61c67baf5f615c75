"""`make gpu-check` without a GPU: it says so; its parts and tests run on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from experiments import gpu_check, gpu_parts, gpu_rates
from experiments.runner import write_json
from launch.planning.roofline import Rates, rates_of
from tests.experiments.small_gpu_parts import SMALL
from tests.launch.processes import ROOT, run

CPU = torch.device("cpu")


class Clock:
    """Every call takes two seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def seconds_of(function: Any, *_: Any, **__: Any) -> float:
            function()
            return 2.0

        monkeypatch.setattr(gpu_rates, "seconds_of", seconds_of)


def figures_of(part: str, mode: str) -> dict[str, Any]:
    """What `tests.experiments.small_gpu_parts` prints."""
    script = str(ROOT / "tests/experiments/small_gpu_parts.py")
    return json.loads(run(sys.executable, script, part, mode).stdout.splitlines()[-1])


def test_command_without_a_gpu_exits_with_2(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(ROOT / "experiments/gpu_check.py")
    done = run(sys.executable, script, f"--out={tmp_path / 'x.json'}", expect=2)
    assert "no CUDA device: nothing to check" in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_rates_are_work_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    full = torch.float32
    # 64^3 multiply-adds; 3^3 taps of 4 x 4 channels at 2 x 6 x 8 places
    assert gpu_rates.gemm_rate(SMALL, CPU, full) == 64**3
    assert gpu_rates.conv_rate(SMALL, CPU, full) == 27 * 16 * 96
    # two products of 2 heads, 48 x 48 scores, 16 numbers a head
    flash = SDPBackend.FLASH_ATTENTION
    assert gpu_rates.sdpa_rate(SMALL, CPU, flash) == 4 * 2 * 48**2 * 16 / 2
    # each of 1024 fp32 numbers is read and written
    assert gpu_rates.copy_rate(SMALL, CPU) == 2 * 4 * 1024 / 2


def test_a_backward_counts_five_products_in_the_seconds_beyond_the_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([2.0, 7.0])

    def seconds_of(function: Any, *_: Any, **__: Any) -> float:
        function()
        return next(seconds)

    monkeypatch.setattr(gpu_rates, "seconds_of", seconds_of)
    rate = gpu_rates.sdpa_rate(SMALL, CPU, SDPBackend.MATH, backward=True)
    # forward 2 s, forward and backward 7 s
    assert rate == 2.5 * 4 * 2 * 32**2 * 16 / 5


def test_kernels_that_the_device_lacks_are_left_out_with_a_reason() -> None:
    found = gpu_rates.measure_rates(SMALL, CPU)
    assert {"gemm_bf16", "conv_fp32", "attention_flash", "bytes"} <= found.rates.keys()
    assert all(math.isfinite(rate) and rate > 0 for rate in found.rates.values())
    assert {"attention_cudnn", "attention_fa3", "attention_sage", "launch"} <= (
        found.left_out.keys()
    )
    assert "only CUDA" in found.left_out["launch"]
    # "host" is measured with the transformer
    names = {field.name for field in dataclasses.fields(Rates)} - {"host"}
    assert found.rates.keys() | found.left_out.keys() == names
    assert not found.rates.keys() & found.left_out.keys()


def test_views_are_no_kernels() -> None:
    x = torch.ones(2, 3)
    with gpu_parts.CountKernels() as counter:
        x.t().reshape(6).add_(1)
        (x + 1).sum()
    # a copy for the reshape, the addition in place, a sum of two
    assert counter.count == 4


@pytest.mark.long
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_part_runs_on_small_models(part: str) -> None:
    found = figures_of(part, "measure")
    figures = found["measured"]
    for name in {
        "rates": [],
        "dit": [
            "dit_forward_s/native",
            "dit_forward_s/_native_flash",
            "dit_forward_s/without adapter",
            "dit_forward_s/compiled",
        ],
        "decode": ["decode_s/float32", "decode_s/bfloat16"],
        "reward_model": ["reward_model_ms_a_token", "reward_model_s/without CoT"],
        "update": ["grpo_s/rollout", "grpo_s/decode", "grpo_s/update"],
    }[part]:
        assert figures[name] > 0, name
    if part == "dit":
        assert figures["repeats/forward"]
        assert figures["repeats/gradient"]
        assert found["rates"]["host"] < 1e-2
    if part == "update":
        assert figures["ratio_max_dev"] == pytest.approx(0, abs=1e-3)


def test_parts_of_the_command_are_those_that_exist() -> None:
    assert tuple(gpu_parts.PARTS) == gpu_check.PARTS


def test_record_has_the_keys_that_plans_read(tmp_path: Path) -> None:
    record = {
        "device": "h100",
        "rates": {},
        "measured": {"device_name": "H100", "left_out": {}, "seconds": {}},
    }
    part = {
        "rates": {"gemm_bf16": 6e14, "launch": 4e-6},
        "measured": {"dit_forward_s/native": 1.25, "repeats/forward": True},
        "left_out": {"attention_sage": "not installed"},
        "seconds": 3.0,
    }
    gpu_check.merge(record, "dit", part)
    assert record["rates"] == {"gemm_bf16": 6e14, "launch": 4e-6}
    assert record["measured"]["seconds"] == {"dit": 3.0}
    write_json(tmp_path / "h100.json", record)
    planned = rates_of("h100", tmp_path / "h100.json")
    assert planned.gemm_bf16 == 6e14
    assert planned.launch == 4e-6
    lines = "\n".join(gpu_check.table(record))
    for text in ("600.00 T/s", "4.00 us", "1.25", "yes", "- not installed"):
        assert text in lines


def test_table_shows_rehearsed_figures_beside_measured_ones() -> None:
    record = {
        "rates": {},
        "measured": {
            "device_name": "H100",
            "left_out": {},
            "rehearsed": {"decode_s/float32": 3.25, "decode_s/bfloat16": 2.5},
            "decode_s/float32": 4.5,
            "minutes": 9.5,
        },
    }
    first, *others = gpu_check.table(record)
    assert first.startswith("H100")
    assert [line.split() for line in others] == [
        ["decode_s/float32", "4.5", "3.25"],
        ["minutes", "9.5"],
    ]


@pytest.mark.long
@pytest.mark.parametrize("part", gpu_check.REHEARSED)
def test_part_is_rehearsed_on_small_models(part: str) -> None:
    """The simulated device refuses tensors of two devices; no figure is missing or zero."""
    figures = figures_of(part, "rehearse")
    wanted = {
        "dit": {"dit_forward_s/native", "dit_forward_s/_native_cudnn"},
        "decode": {"decode_s/float32", "decode_peak_gib/bfloat16"},
        "reward_model": {"reward_model_ms_a_token"},
        "update": {"grpo_s/rollout", "grpo_s/decode", "grpo_s/update"},
    }[part]
    assert wanted <= figures.keys()
    assert all(value > 0 for value in figures.values()), figures


def test_rehearsal_on_an_unknown_device_exits_with_2() -> None:
    script = str(ROOT / "experiments/gpu_check.py")
    done = run(sys.executable, script, "--rehearse", "abacus", expect=2)
    assert "abacus" in done.stderr


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "NVIDIA L40S"),
    ],
)
def test_device_has_the_name_of_plans(full: str, short: str) -> None:
    assert gpu_check.short_name(full) == short


@pytest.mark.long
def test_tests_of_the_gpu_run_on_a_cpu_where_they_can() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "GPU_CHECK_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.long
def test_tests_of_the_gpu_are_skipped_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no CUDA device: nothing to check" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
