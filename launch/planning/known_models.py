"""Sizes of the published models in the recipes, so that a plan needs neither weights nor the hub.

The numbers are those of the models' config files, as diffusers and transformers publish them.
tests/launch/planning/test_plan.py compares the parameters they make with the published counts.
"""

from __future__ import annotations

import re
from typing import Any

# What all sizes of Wan 2.1 share.
_WAN_COMMON: dict[str, Any] = {
    "attention_head_dim": 128,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "text_dim": 4096,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
# Transformers by hub name, huggingface.co/NAME/transformer/config.json.
WAN: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        **_WAN_COMMON,
        "num_layers": 30,
        "num_attention_heads": 12,
        "ffn_dim": 8960,
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {
        **_WAN_COMMON,
        "num_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 13_824,
    },
}
# All sizes of Wan 2.1 share the VAE and the text encoder.
WAN_VAE: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    # The key is spelt so in diffusers.
    "temperal_downsample": [False, True, True],
}
UMT5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10_240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 256_384,
    "feed_forward_proj": "gated-gelu",
}

# The vision tower of the 2B and the 4B.
_SMALL_VISION: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
# The vision tower of the 8B.
_LARGE_VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _qwen3_vl(
    text: dict[str, Any], vision: dict[str, Any], *, tied: bool
) -> dict[str, Any]:
    """Config of a Qwen3-VL; ``tied`` shares the matrix of the embedding with the output."""
    common_text = {
        "vocab_size": 151_936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }
    common_vision = {
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
    }
    return {
        "text_config": {**common_text, **text},
        "vision_config": {**common_vision, **vision},
        "tie_word_embeddings": tied,
    }


# Language models by size.
_TEXT_2B = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
}
_TEXT_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
}
_TEXT_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12_288,
}
QWEN3_VL: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(_TEXT_2B, _SMALL_VISION, tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(_TEXT_4B, _SMALL_VISION, tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(_TEXT_8B, _LARGE_VISION, tied=False),
}
# A size that no letter or digit touches: "2b" in "from_2b", not in "x2bit".
_SIZE = re.compile(r"(?<![a-z0-9.])([248]b)(?![a-z0-9])")


def closest_qwen3_vl(name: str) -> str:
    """Choose the published Qwen3-VL that stands for a reward model that does not exist yet.

    Its size is the last size in ``name`` (models/Qwen3-VL-2B, runs/descore_4b/final), else 8B.
    """
    if name in QWEN3_VL:
        return name
    sizes = _SIZE.findall(name.lower()) or ["8b"]
    return f"Qwen/Qwen3-VL-{sizes[-1].upper()}-Instruct"
