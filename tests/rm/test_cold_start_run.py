"""launch/cold_start.py on a tiny Qwen3-VL: resumed runs, ranks, ZeRO stages and the export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_tensors
from common.log import read_metrics
from rm.cold_start import ColdStart
from rm.config import ColdStartConfig
from rm.data import read_pairs
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from tests.launch.processes import deepspeed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.rm.cold_start_runs", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after 2 steps" in done.stdout
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """The folder, with the runs of two ranks under the deepspeed launcher."""
    done = deepspeed(2, str(ROOT / "tests" / "rm" / "cold_start_runs.py"), str(folder))
    assert "after 1 steps" in done.stdout
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_resumed_cold_start_run_equals_an_uninterrupted_run(folder):
    whole, stopped = metrics(folder / "whole"), metrics(folder / "stopped")
    assert [row["step"] for row in whole] == [0, 1, 2, 3]
    assert whole == stopped
    name = "step-000004/engine.safetensors"
    one, other = (
        load_tensors(folder / run / "checkpoints" / name)
        for run in ("whole", "stopped")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.long
@pytest.mark.parametrize("name", ["two", "three"])
def test_two_ranks_under_zero_2_and_3_match_one_rank(ranks, name):
    """Four backwards on one rank, two on each of two; unequal shares of the held-out pairs."""
    one, other = metrics(ranks / "one"), metrics(ranks / name)
    assert [row["step"] for row in one] == [0, 1]
    assert {
        "train/loss",
        "train/margin",
        "train/masked",
        "train/grad_norm",
        "heldout/accuracy",
    } <= one[0].keys()
    for alone, together in zip(one, other, strict=True):
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            assert together[key] == pytest.approx(value, abs=1e-4, rel=1e-4), key


@pytest.mark.long
def test_resumed_zero_3_run_equals_an_uninterrupted_run(ranks):
    assert metrics(ranks / "three") == metrics(ranks / "three_stopped")
    name = "checkpoints/step-000002/engine.safetensors"
    one, other = (
        load_tensors(ranks / run / name) for run in ("three", "three_stopped")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.long
def test_zero_3_exports_the_reward_model_of_one_rank(ranks):
    one, other = (
        DeScore.load(ranks / run / "final").state_dict() for run in ("one", "three")
    )
    start = DeScore.from_base(ranks / "base").state_dict()
    assert one.keys() == other.keys()
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-5
    for key in (
        "query",
        "head.weight",
        "backbone.model.language_model.layers.0.self_attn.q_proj.weight",
    ):
        assert float((one[key] - start[key]).abs().max()) > 1e-4, key


@pytest.mark.slow
def test_exported_reward_model_has_the_fp32_weights(folder):
    files = [folder / f"{i}{side}.mp4" for i in range(3) for side in "AB"]
    scorer = DeScoreScorer.load(folder / "whole" / "final", cots=0)
    assert scorer.model.cot_in_training == "masked"
    value_B = scorer.score(files, [f"p{i}" for i in range(3) for _ in "AB"]).value_B
    assert value_B.isfinite().all()
    assert value_B.std() > 0
    trained = load_tensors(
        folder / "whole" / "checkpoints" / "step-000004" / "engine.safetensors"
    )
    assert torch.equal(scorer.model.head.weight, trained["weight.head.weight"])
    assert torch.equal(scorer.model.query, trained["weight.query"])
    rounded = scorer.model.head.weight.bfloat16().float()
    assert not torch.equal(
        scorer.model.head.weight, rounded
    )  # a bfloat16 run keeps more than bfloat16
    untrained = DeScore.from_base(folder / "base")
    assert not torch.equal(untrained.head.weight, scorer.model.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "one"])
def test_last_evaluation_is_of_the_exported_folder(folder, name):
    """A bfloat16 run with LoRA, and a float32 run whose LoRA is merged."""
    dtype = torch.float32 if name == "one" else torch.bfloat16
    model = DeScore.load(folder / name / "final", dtype=dtype)
    pairs = read_pairs(folder / "pairs.csv").pairs[:3]
    loop = ColdStart(
        ColdStartConfig(), model, engine=None, pairs=pairs, schedule=None, seed=0
    )
    margins = []
    for pair in pairs:
        with torch.no_grad():
            reward_12K = loop.rewards([pair], [(pair.cot_A, pair.cot_B)])
        margins.append(reward_12K[0, 0] - reward_12K[0, 1])
    measured = load_tensors(folder / name / "margins.safetensors")["margin_NK"][:3]
    if name == "one":
        # merged and apart differ by fp32 rounding
        torch.testing.assert_close(torch.stack(margins), measured, atol=1e-5, rtol=0)
    else:
        assert torch.equal(torch.stack(margins), measured)
        stored = load_tensors(folder / name / "final" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        trained = load_tensors(
            folder / name / "checkpoints" / "step-000004" / "engine.safetensors"
        )
        key = "model.language_model.layers.0.mlp.up_proj.lora_B"
        master = trained[f"weight.backbone.{key}.default.weight"]
        assert torch.equal(stored[f"base_model.model.{key}.weight"], master)
        assert float(master.abs().max()) > 0
