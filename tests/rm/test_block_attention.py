"""Packed CoTs under FlexAttention's block mask and under the dense mask."""

from __future__ import annotations

import pytest
import torch

from rm.block_attention import (
    NAME,
    block_mask,
    dense_mask,
    packed_mask,
    switch_to_blocks,
    use_attention,
)
from rm.config import Generation
from rm.generate import generate, rewards_from_cache
from rm.model import DeScore
from rm.packed import PackedCot, pack, packed_forward
from rm.video import prepare
from tests.rm.test_generate import PROMPTS, judge
from tests.tiny_qwen import SETTINGS, random_frames

# torch says that its forward without compilation is slow.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


@pytest.fixture
def model() -> DeScore:
    return judge()


def inputs(model: DeScore, rows: int):
    videos = [
        prepare(random_frames(i, frames=4 + 2 * i), SETTINGS, fps=4.0)
        for i in range(rows)
    ]
    encoded = [
        model.encode(prompt, video)
        for prompt, video in zip(PROMPTS, videos, strict=False)
    ]
    return encoded, videos


def test_dense_mask_by_hand() -> None:
    """A prompt of two tokens, CoTs of one and two tokens, and padding."""
    segment_BL = torch.tensor([[0, 0, 1, 2, 2, -1]])
    want = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert dense_mask(segment_BL).squeeze().int().tolist() == want


def test_block_mask_is_the_dense_mask() -> None:
    """Two rows of 300 tokens, 3 x 3 blocks of 128."""
    segments = torch.zeros(2, 300, dtype=torch.long)
    segments[0, 100:200] = 1
    segments[0, 200:] = 2
    segments[1, 20:150] = 1
    segments[1, 150:260] = 2
    segments[1, 260:] = -1
    dense = dense_mask(segments)
    blocks = block_mask(segments)
    row_B = torch.arange(2)[:, None, None]
    index = torch.arange(300)
    found = blocks.mask_mod(row_B, row_B * 0, index[:, None], index[None, :])
    assert torch.equal(found, dense[:, 0])
    # a block is computed if, and only if, it has a visible pair
    padded = torch.zeros(2, 384, 384, dtype=torch.bool)
    padded[:, :300, :300] = dense[:, 0]
    tiles = padded.view(2, 3, 128, 3, 128).any(-1).any(2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), tiles)


@torch.no_grad()
def test_packed_forward_by_blocks_equals_the_dense_one(model) -> None:
    """Log-probs and rewards of CoTs of unequal lengths, rows of unequal lengths."""
    encoded, videos = inputs(model, 2)
    cots = [
        [
            PackedCot(tuple(range(40, 140)), finished=True),
            PackedCot((9,), finished=False),
        ],
        [PackedCot((), finished=True), PackedCot(tuple(range(60, 90)), finished=True)],
    ]
    packed = pack(model, encoded, videos, cots)
    dense = packed_forward(model, packed, temperature=1.0)
    switch_to_blocks(model.backbone.config.text_config)
    mask = packed_mask(model, packed.segment_BL)
    assert not isinstance(mask, torch.Tensor)
    blocks = packed_forward(model, packed, temperature=1.0)
    assert dense.log_prob_BGT.abs().max() > 1
    torch.testing.assert_close(
        blocks.log_prob_BGT, dense.log_prob_BGT, atol=2e-5, rtol=0
    )
    torch.testing.assert_close(blocks.reward_BGK, dense.reward_BGK, atol=1e-5, rtol=0)


def test_other_forwards_are_as_before(model) -> None:
    """CoTs and rewards bit for bit, on a model whose packed forwards go by blocks."""
    encoded, videos = inputs(model, 3)
    how = Generation(max_new_tokens=12, temperature=1.0, repetition_penalty=1.0)

    def results():
        batch = model.batch(encoded, videos, query=False)
        cots = generate(model, batch, how, seeds=range(3))
        with torch.no_grad():
            plain = model(model.batch(encoded, videos))
        return cots.token_BL, rewards_from_cache(model, cots), plain

    before = results()
    switch_to_blocks(model.backbone.config.text_config)
    after = results()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_cpu_keeps_the_mask_and_refuses_flex(model, tmp_path) -> None:
    text_config = model.backbone.config.text_config
    use_attention(model, "auto")
    assert text_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"dual_rl\.attention=flex.*cpu"):
        use_attention(model, "flex")
    # a checkpoint does not name it
    switch_to_blocks(text_config)
    model.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
