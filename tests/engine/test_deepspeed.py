"""DeepSpeed's JSON, and real engines on real ranks against torch's AdamW."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from engine.config import OptimizerConfig
from engine.deepspeed import build_engine, ds_config, unknown_keys
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
@pytest.mark.parametrize("ranks", [1, 2])
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
    assert len(results) == 9
    for name, distance in results.items():
        assert distance["buffer"] < 1e-7, name  # not rounded to bfloat16
        assert distance["loaded"] == 0.0, name
        # stages sum gradients in other orders; the same stage is equal bit for bit
        assert distance["resumed"] <= (1e-7 if "to" in name else 0.0), name
        assert distance["plain"] < (2e-2 if "bf16" in name else 1e-7), name
