"""The reward model on a GPU: a token as a CUDA graph, no waits, and attention by blocks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch

from rm import generate as generation
from rm.block_attention import NAME, use_attention
from rm.config import Generation
from rm.generate import GeneratedCots, generate, rewards_from_cache
from rm.model import Batch, DeScore
from rm.packed import PackedCot, pack, packed_forward
from rm.video import prepare
from tests.launch.processes import ROOT
from tests.rm.test_generate import PROMPTS
from tests.tiny_qwen import random_frames


@pytest.fixture
def model(device: torch.device) -> DeScore:
    """The Qwen3-VL of the embedded world, in fp32."""
    return DeScore.from_base(ROOT / "assets" / "shapes" / "qwen").eval().to(device)


def inputs(model: DeScore, rows: int):
    videos = [
        prepare(random_frames(row, frames=4 + row), model.settings, fps=4.0)
        for row in range(rows)
    ]
    encoded = [
        model.encode(prompt, video)
        for prompt, video in zip(PROMPTS, videos, strict=False)
    ]
    return encoded, videos


def batch_of(model: DeScore) -> Batch:
    encoded, videos = inputs(model, 4)
    return model.batch(encoded, videos, query=False)


def written(model: DeScore, limit: int, seeds: Sequence[int] | None) -> GeneratedCots:
    how = Generation(
        max_new_tokens=limit,
        temperature=0.0 if seeds is None else 1.0,
        repetition_penalty=1.05,
    )
    return generate(model, batch_of(model), how, seeds=seeds)


@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4]], ids=["greedy", "sampled"])
def test_tokens_of_a_graph_are_those_of_single_kernels(
    model: DeScore, monkeypatch: pytest.MonkeyPatch, seeds: list[int] | None
) -> None:
    """300 tokens, over buffers that move every 64."""
    monkeypatch.setattr("rm.kv_cache.BLOCK", 64)
    graph = written(model, 300, seeds)
    rewards = rewards_from_cache(model, graph)
    monkeypatch.setattr(generation, "can_capture", lambda model: False)
    plain = written(model, 300, seeds)
    assert torch.equal(graph.token_BL, plain.token_BL)
    assert torch.equal(graph.length_B, plain.length_B)
    torch.testing.assert_close(
        rewards, rewards_from_cache(model, plain), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("captured", [True, False])
def test_token_waits_for_nothing(
    model: DeScore,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    *,
    captured: bool,
) -> None:
    """48 more tokens cost three looks whether all rows have ended."""
    model.end_id = model.query_id
    monkeypatch.setattr(generation, "can_capture", lambda model: captured)
    waits = []
    for limit in (32, 80):
        written(model, limit, [1, 2, 3, 4])
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            written(model, limit, [1, 2, 3, 4])
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(item.message) for item in caught))
    assert waits[1] - waits[0] == 3


def test_gradients_by_blocks_are_those_of_the_dense_mask(
    model: DeScore, cuda: torch.device
) -> None:
    """Log-probs and rewards of packed CoTs, and their gradient at the language model."""
    encoded, videos = inputs(model, 2)
    cots = [
        [
            PackedCot(tuple(range(40, 140)), finished=True),
            PackedCot((9,), finished=False),
        ],
        [PackedCot((), finished=True), PackedCot(tuple(range(60, 90)), finished=True)],
    ]
    packed = pack(model, encoded, videos, cots).to(cuda)
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if "language_model.layers" in name
    ]

    def gradients() -> list[torch.Tensor]:
        output = packed_forward(model, packed, temperature=1.0)
        loss = output.log_prob_BGT.sum() + output.reward_BGK.sum()
        return torch.autograd.grad(loss, weights)

    dense = gradients()
    use_attention(model, "auto")
    assert model.backbone.config.text_config._attn_implementation == NAME
    for blocks, want in zip(gradients(), dense, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(blocks, want, atol=1e-2 * scale, rtol=0)
