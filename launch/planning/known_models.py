"""Sizes of the published models that the recipes name, so that a plan needs neither weights nor the hub.

Sources: the models' own config files as diffusers and transformers publish them. Parameters that these sizes make are
counted in tests/launch/planning/test_plan.py against the published counts and by hand.
"""

from __future__ import annotations

import re
from typing import Any


def _wan(layers: int, heads: int, wide: int) -> dict[str, Any]:
    return {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": wide,
        "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_dim": 4096,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
    }  # fmt: skip


WAN_VAE = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}  # fmt: skip
UMT5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 256_384,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WAN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(30, 12, 8960),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(40, 40, 13_824),
}


def _qwen3_vl(
    hidden: int,
    layers: int,
    heads: int,
    wide: int,
    *,
    tied: bool,
    vision: tuple[int, int, int],
    deep: list[int],
) -> dict[str, Any]:
    depth, seen, seen_wide = vision
    return {
        "text_config": {
            "vocab_size": 151_936, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": wide, "tie_word_embeddings": tied,
        },
        "vision_config": {
            "depth": depth, "hidden_size": seen, "intermediate_size": seen_wide, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": hidden, "num_position_embeddings": 2304, "deepstack_visual_indexes": deep,
        },
        "tie_word_embeddings": tied,
    }  # fmt: skip


_SMALL_EYE: dict[str, Any] = {"vision": (24, 1024, 4096), "deep": [5, 11, 17]}
QWEN3_VL = {
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 28, 16, 6144, tied=True, **_SMALL_EYE),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 36, 32, 9728, tied=True, **_SMALL_EYE),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        4096, 36, 32, 12_288, tied=False, vision=(27, 1152, 4304), deep=[8, 16, 24]
    ),
}
ASSUMED_JUDGE = "Qwen/Qwen3-VL-8B-Instruct"
_SIZE = re.compile(r"(?<![a-z0-9.])([248]b)(?![a-z0-9])")


def judge_like(name: str) -> str:
    """The published Qwen3-VL that stands for a judge which is not there: of the size that its name says
    (models/Qwen3-VL-2B, runs/descore_4b/final), else `ASSUMED_JUDGE`.
    """
    if name in QWEN3_VL:
        return name
    said = _SIZE.findall(name.lower())
    return f"Qwen/Qwen3-VL-{said[-1].upper()}-Instruct" if said else ASSUMED_JUDGE
