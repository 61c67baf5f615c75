"""Embeddings equal to the stock pipeline's, each computed once."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from common import progress
from generator.prompts import PromptCache, count_tokens
from tests.tiny import MAX_LENGTH

TEXTS = [
    "a red circle",
    "  a   blue\n square ",
    "cats &amp; dogs",
    "",
    "a prompt much longer than the maximum length",
]


@pytest.fixture
def pipeline(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, dtype=torch.float32)


def test_equal_to_encode_prompt(pipeline: WanPipeline) -> None:
    cache = PromptCache(pipeline, max_length=MAX_LENGTH)
    got = cache.get(TEXTS, device=torch.device("cpu"), dtype=torch.float32)
    want, negative = pipeline.encode_prompt(
        TEXTS, negative_prompt="", max_sequence_length=MAX_LENGTH
    )
    assert got.shape == (5, MAX_LENGTH, 32)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(got[3], negative[0], atol=1e-6)
    # 12 bytes and the end token, then zeros; "" is the end token alone; 44 bytes fill all 24 places
    assert [int(rows.any(dim=1).sum()) for rows in got] == [13, 14, 12, 1, 24]


def test_count_tokens_is_what_the_pipeline_reads_without_a_limit(folder: Path) -> None:
    """A byte is a token here, and an end token follows: 44 bytes are 45 tokens."""
    assert count_tokens(TEXTS, folder) == [13, 14, 12, 1, 45]


def test_texts_that_clean_to_the_same_are_equal(pipeline: WanPipeline) -> None:
    cache = PromptCache(pipeline, max_length=MAX_LENGTH)
    got = cache.get(
        ["cats & dogs", "cats &amp; dogs "],
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert torch.equal(got[0], got[1])
    assert not torch.allclose(
        got[0], cache.get(["cats"], device=torch.device("cpu"), dtype=torch.float32)[0]
    )


def test_each_prompt_is_encoded_once_and_alone(pipeline: WanPipeline) -> None:
    calls: list[int] = []
    pipeline.text_encoder.register_forward_hook(
        lambda _, __, out: calls.append(len(out.last_hidden_state))
    )
    cache = PromptCache(pipeline, max_length=MAX_LENGTH)
    cache.encode(["a", "b", "a"])
    cache.get(["b", "a", "b"], device=torch.device("cpu"), dtype=torch.bfloat16)
    assert calls == [1, 1]
    assert len(cache) == 2


def test_memory_of_the_freed_encoder_goes_back_to_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    weight = weakref.ref(pipeline.text_encoder.shared.weight)
    gone: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: gone.append(weight() is None)
    )
    PromptCache(pipeline, max_length=MAX_LENGTH).free_text_encoder()
    assert gone == [True]


def test_each_encoded_prompt_is_progress(
    pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []
    monkeypatch.setattr(progress, "tick", lambda: ticks.append(1))
    PromptCache(pipeline, max_length=MAX_LENGTH).encode(["a", "b", "a"])
    assert len(ticks) == 2


def test_freed_encoder_serves_known_prompts_only(pipeline: WanPipeline) -> None:
    cache = PromptCache(pipeline, max_length=MAX_LENGTH)
    before = cache.get(["a"], device=torch.device("cpu"), dtype=torch.float32)
    cache.free_text_encoder()
    assert torch.equal(
        cache.get(["a"], device=torch.device("cpu"), dtype=torch.float32), before
    )
    with pytest.raises(RuntimeError, match="'new'"):
        cache.encode(["new"])
