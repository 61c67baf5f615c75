"""DeepSpeed's settings, and deepspeed itself: real engines on real ranks against torch's AdamW."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from engine.config import OptimizerConfig
from engine.deepspeed import build_engine, ds_config, unknown_keys
from tests.launch.processes import ROOT, run, torchrun


def test_ds_config_says_what_was_asked() -> None:
    config = ds_config(
        optimizer=OptimizerConfig(max_grad_norm=0.5),
        zero_stage=2,
        dtype="float32",
        accumulation=6,
        micro_batch=3,
    )
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 6
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False}
    assert "bf16" not in config
    assert "optimizer" not in config  # deepspeed's own are compiled at first use


def test_overrides_reach_any_key_and_leave_its_neighbours() -> None:
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


def test_bfloat16_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage >= 1"):
        ds_config(
            optimizer=OptimizerConfig(), zero_stage=0, dtype="bfloat16", accumulation=1
        )


def test_the_accumulation_is_not_up_for_overriding() -> None:
    overrides = {"gradient_accumulation_steps": 8}
    with pytest.raises(ValueError, match="follows from the batch: 4, not 8"):
        ds_config(
            optimizer=OptimizerConfig(),
            zero_stage=1,
            dtype="float32",
            accumulation=4,
            overrides=overrides,
        )


def test_the_stage_is_the_runs() -> None:
    overrides = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="is zero_stage: 2, not 3"):
        ds_config(
            optimizer=OptimizerConfig(),
            zero_stage=2,
            dtype="float32",
            accumulation=1,
            overrides=overrides,
        )


def test_keys_that_deepspeed_would_ignore_are_told_from_those_it_knows() -> None:
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


def test_an_engine_needs_something_to_train() -> None:
    module = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        build_engine(module, optimizer=OptimizerConfig(), zero_stage=1, accumulation=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_are_torch_and_go_on_bit_by_bit(ranks: int) -> None:
    """ZeRO 0 to 3, and from one on to another; four backwards a step over one or two ranks, called past the engine."""
    script = str(ROOT / "tests" / "engine" / "engine_ranks.py")
    done = run(sys.executable, script) if ranks == 1 else torchrun(ranks, script)
    results = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    assert (
        "the weights of rank 1 are not those of rank 0" in results.pop("apart")
    ) == (ranks == 2)
    for name, found in results.pop("not finite").items():  # as if it had never been
        assert found == {"moved": 0.0, "skipped": 1.0, "after": 0.0}, name
    assert results.pop("too often").startswith(
        "2 updates in a row had a gradient that is not finite"
    )
    assert len(results) == 9
    for name, distance in results.items():
        assert distance["buffer"] < 1e-7, name  # not rounded to bfloat16
        assert distance["loaded"] == 0.0, name
        # stages sum gradients in other orders, one rounding apart; the same stage is bit for bit
        assert distance["resumed"] <= (1e-7 if "to" in name else 0.0), name
        assert distance["plain"] < (2e-2 if "bf16" in name else 1e-7), name
