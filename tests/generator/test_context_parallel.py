"""Ranks that share the tokens of a sample compute what one rank computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from generator import context_parallel
from generator.wan import WanGenerator
from tests.launch.processes import ROOT, torchrun
from tests.tiny import tiny_config

LATENT = (16, 21, 60, 104)  # Wan 1.3B at 480x832x81
PATCH = (1, 2, 2)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    script = str(ROOT / "tests/generator/context_ranks.py")
    return json.loads(torchrun(2, script, str(folder)).stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("case", ["lora", "checkpointing", "full"])
def test_shared_tokens_give_the_bits_of_one_rank(
    two_ranks: dict[str, Any], case: str
) -> None:
    found = two_ranks[case]
    assert found["bits"]
    assert found["reference bits"]
    assert found["alone bits"]


@pytest.mark.long
@pytest.mark.parametrize("case", ["lora", "checkpointing", "full"])
def test_gradient_is_the_sum_over_the_ranks_of_a_sample(
    two_ranks: dict[str, Any], case: str
) -> None:
    found = two_ranks[case]
    assert found["sum"] < 1e-6
    # each rank has a part that is not the gradient
    assert found["part"] > 0.3


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_engine_has_the_gradient_of_one_rank(
    two_ranks: dict[str, Any], stage: int
) -> None:
    found = two_ranks[f"zero {stage}"]
    assert found["gradient"] < 1e-6
    assert found["norm"] < 1e-6


@pytest.mark.long
def test_start_up_check_sees_parts_that_are_not_summed(
    two_ranks: dict[str, Any],
) -> None:
    assert two_ranks["zero 1"]["gap"] < 1e-6
    assert two_ranks["zero 1"]["gradients left"] == 0
    assert two_ranks["gap without sum"] > 0.1


# 21 x 30 x 52 = 32760 = 2^3 3^2 5 7 13 tokens
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_480p_tokens_divide_over_up_to_8_ranks(ranks: int) -> None:
    context_parallel.check_tokens(LATENT, PATCH, ranks)


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide the 32760 tokens"):
        context_parallel.check_tokens(LATENT, PATCH, 16)


@pytest.mark.parametrize(("heads", "ranks"), [(12, 4), (24, 8), (40, 8)])
def test_heads_of_published_wans_divide(heads: int, ranks: int) -> None:
    context_parallel.check_heads({"num_attention_heads": heads}, ranks)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="12 attention heads"):
        context_parallel.check_heads({"num_attention_heads": 12}, 8)


def test_video_whose_tokens_do_not_divide_is_refused_at_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if there were two ranks; 3 latent frames of 1 x 1 tokens
    monkeypatch.setattr(context_parallel, "join_ranks", lambda *_: None)
    cfg = tiny_config(folder, height=16, width=16, context_parallel=2)
    with pytest.raises(ValueError, match="must divide the 3 tokens"):
        WanGenerator.load(cfg, device="cpu")


def test_a_single_rank_shares_nothing() -> None:
    assert context_parallel.join_ranks(1, torch.device("cpu")) is None
    with pytest.raises(ValueError, match="must divide the 1 ranks"):
        context_parallel.join_ranks(2, torch.device("cpu"))


def test_attention_backend_that_cannot_share_tokens_is_refused(folder: Path) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    transformer = WanGenerator.load(tiny_config(folder), device="cpu").transformer
    context_parallel.check_backend(transformer)
    with (
        attention_backend("_native_math"),
        pytest.raises(ValueError, match="_native_math cannot run"),
    ):
        context_parallel.check_backend(transformer)
