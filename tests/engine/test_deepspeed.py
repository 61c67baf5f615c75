"""DeepSpeed's JSON, and real engines on real ranks against torch's AdamW."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from common.config import ConfigError, load
from engine.config import OptimizerConfig
from engine.deepspeed import build_engine, ds_config, unknown_keys
from launch.schemas.training import ColdStartRun
from tests.launch.processes import ROOT, run, torchrun


def test_ds_config_holds_stage_accumulation_and_clipping() -> None:
    config = ds_config(
        optimizer=OptimizerConfig(max_grad_norm=0.5),
        zero_stage=2,
        dtype="float32",
        accumulation=6,
    )
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 6
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False}
    assert "bf16" not in config
    assert "optimizer" not in config  # deepspeed's own are compiled at first use


def test_ds_config_override_changes_only_its_key() -> None:
    overrides = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 9.0}
    config = ds_config(
        optimizer=OptimizerConfig(),
        zero_stage=1,
        dtype="bfloat16",
        accumulation=1,
        overrides=overrides,
    )
    assert config["zero_optimization"] == {
        "stage": 1,
        "memory_efficient_linear": False,
        "overlap_comm": True,
    }
    assert config["gradient_clipping"] == 9.0
    assert config["bf16"] == {"enabled": True}
    assert "data_types" not in config


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "override", "want"),
    [
        (2, "bfloat16", None, "fp32"),
        (3, "bfloat16", None, "fp32"),
        (2, "bfloat16", "bf16", "bf16"),
        (1, "bfloat16", "bf16", "bf16"),
        (1, "float32", "fp32", "fp32"),
        (0, "float32", None, None),
        (2, "float32", None, None),
    ],
)
def test_ds_config_adds_gradients_of_bf16_weights_in_fp32(
    zero_stage: int, dtype: str, override: str | None, want: str | None
) -> None:
    config = ds_config(
        optimizer=OptimizerConfig(),
        zero_stage=zero_stage,
        dtype=dtype,
        accumulation=4,
        overrides={"data_types": {"grad_accum_dtype": override}} if override else {},
    )
    assert config.get("data_types", {}).get("grad_accum_dtype") == want


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "types", "words"),
    [
        (1, "bfloat16", {"grad_accum_dtype": "fp32"}, "zero_stage=2"),
        (1, "bfloat16", {"grad_accum_dtype": "float32"}, "zero_stage=2"),
        (2, "float32", {"grad_accum_dtype": "bf16"}, "bf16 needs bfloat16"),
        (2, "bfloat16", {"grad_accum_dtype": "fp16"}, "'fp16'"),
        (2, "bfloat16", "fp32", "data_types"),
    ],
)
def test_ds_config_refuses_gradients_that_would_be_wrong(
    zero_stage: int, dtype: str, types: object, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ds_config(
            optimizer=OptimizerConfig(),
            zero_stage=zero_stage,
            dtype=dtype,
            accumulation=4,
            overrides={"data_types": types},
        )


def test_training_config_refuses_fp32_gradients_of_bf16_weights_under_zero_1() -> None:
    overrides = [
        "run_dir=x",
        "base=x",
        "data.train=x",
        "zero_stage=1",
        "deepspeed.data_types.grad_accum_dtype=fp32",
    ]
    with pytest.raises(ConfigError, match="zero_stage=2"):
        load(ColdStartRun, None, overrides)
    run = load(ColdStartRun, None, [*overrides, "zero_stage=2"])
    assert run.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}


def test_ds_config_bfloat16_with_zero_0_raises() -> None:
    with pytest.raises(ValueError, match="zero_stage"):
        ds_config(
            optimizer=OptimizerConfig(), zero_stage=0, dtype="bfloat16", accumulation=1
        )


def test_ds_config_override_of_accumulation_raises() -> None:
    overrides = {"gradient_accumulation_steps": 8}
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        ds_config(
            optimizer=OptimizerConfig(),
            zero_stage=1,
            dtype="float32",
            accumulation=4,
            overrides=overrides,
        )


def test_ds_config_override_of_stage_raises() -> None:
    overrides = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="zero_stage"):
        ds_config(
            optimizer=OptimizerConfig(),
            zero_stage=2,
            dtype="float32",
            accumulation=1,
            overrides=overrides,
        )


def test_unknown_keys_lists_only_keys_that_deepspeed_ignores() -> None:
    known = {
        "zero_optimization": {},
        "bf16": {},
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
    }
    assert unknown_keys(known) == []
    assert unknown_keys({**known, "foo": 7, "zero_optim": {}}) == [
        "deepspeed.foo",
        "deepspeed.zero_optim",
    ]


def test_build_engine_without_trainable_parameter_raises() -> None:
    module = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="Linear"):
        build_engine(module, optimizer=OptimizerConfig(), zero_stage=1, accumulation=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_engine_matches_torch_and_resumes_bit_by_bit(ranks: int) -> None:
    """ZeRO 0 to 3 and changes between them; four backwards a step over one or two ranks.

    The module is called directly, not through the engine.
    """
    script = str(ROOT / "tests" / "engine" / "engine_ranks.py")
    done = run(sys.executable, script) if ranks == 1 else torchrun(ranks, script)
    results = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    assert ("rank 1" in results.pop("apart")) == (ranks == 2)
    # a skipped update leaves no trace
    for name, outcome in results.pop("not finite").items():
        assert outcome == {"moved": 0.0, "skipped": 1.0, "after": 0.0}, name
    assert results.pop("too often").startswith("2 ")
    assert len(results) == 11
    for name, distance in results.items():
        assert distance["buffer"] < 1e-7, name  # not rounded to bfloat16
        assert distance["loaded"] == 0.0, name
        # stages sum gradients in other orders; the same stage is equal bit for bit
        assert distance["resumed"] <= (1e-7 if "to" in name else 0.0), name
        assert distance["plain"] < (2e-2 if "bf16" in name else 1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_accumulated_gradient_is_the_fp32_sum(ranks: int) -> None:
    """64 backwards of gradients 16, 1/64, 1/64, ...: by hand 16 + 63 / 64."""
    script = str(ROOT / "tests" / "engine" / "accumulation_ranks.py")
    done = run(sys.executable, script) if ranks == 1 else torchrun(ranks, script)
    norms = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    want = 16 + 63 / 64
    # the reason for the check: DeepSpeed multiplies the gradient
    refused = norms.pop("refused")
    assert min(refused) > 500
    # ZeRO 1 keeps the sum of a rank in bfloat16
    assert norms.pop("1 bfloat16")[0] < want - 0.4
    for name, found in norms.items():
        # bfloat16 gradients of several ranks are averaged in bfloat16
        exact = ranks == 1 or "float32" in name
        assert found == pytest.approx([want, want], rel=0.0 if exact else 1e-3), name
