"""Attention of packed chains of thought (CoTs): who sees whom, densely or by blocks.

A dense mask has L^2 entries, keeps torch's attention from its fastest kernels, and computes
every block of it. FlexAttention (arXiv 2412.05496) skips the blocks in which nobody sees
anybody, so its time falls with the share of the mask that is empty. torch has its backward on
CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig

    from rm.model import DeScore

# What transformers' configs call the attention of this module.
NAME = "descore_blocks"


def use_attention(model: DeScore, attention: Literal["auto", "mask", "flex"]) -> None:
    """Choose the attention of a model's packed forwards; all others stay as they are.

    auto is flex on CUDA and mask on any other device. Raises ValueError for flex elsewhere.
    """
    on_cuda = model.device.type == "cuda"
    if attention == "flex" and not on_cuda:
        raise ValueError(
            "dual_rl.attention=flex needs a GPU: FlexAttention has no backward on "
            f"{model.device.type}; auto takes it where it can"
        )
    if attention == "mask" or not on_cuda:
        return
    switch_to_blocks(model.backbone.config.text_config)


def switch_to_blocks(text_config: PreTrainedConfig) -> None:
    """Let a language model take block masks, besides the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    text_config._attn_implementation = NAME


def packed_mask(model: DeScore, segment_BL: Tensor) -> Tensor | BlockMask:
    """The mask that a model's attention takes; see `dense_mask`."""
    text_config = model.backbone.config.text_config
    if text_config._attn_implementation == NAME:
        return block_mask(segment_BL)
    return dense_mask(segment_BL)


def dense_mask(segment_BL: Tensor) -> Tensor:
    """Mask (B, 1, L, L), True where a query sees a key: its own segment and 0, causally.

    Segment 0 is the prompt, 1 to G are the CoTs, and -1 is padding.
    """
    index_L = torch.arange(segment_BL.shape[1], device=segment_BL.device)
    is_causal_LL = index_L[:, None] >= index_L[None, :]
    is_same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
    is_prompt_B1L = segment_BL[:, None, :] == 0
    visible_BLL = (is_same_BLL | is_prompt_B1L) & is_causal_LL
    return visible_BLL.unsqueeze(1)


def block_mask(segment_BL: Tensor) -> BlockMask:
    """The mask of `dense_mask`, as FlexAttention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_same = segment_BL[b, query] == segment_BL[b, key]
        is_prompt = segment_BL[b, key] == 0
        return (is_same | is_prompt) & (query >= key)

    rows, length = segment_BL.shape
    return create_block_mask(
        is_visible,
        B=rows,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=segment_BL.device,
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, heads, L, C) to (B, L, heads, C).

    FlexAttention for a block mask, and transformers' "sdpa" for all else.
    """
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            **options,
        )
    attended = kernel(query.device.type)(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None


@cache
def kernel(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled on a GPU; on a CPU it is torch's plain forward, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        return torch.compile(flex_attention)
    return flex_attention
