"""Sizes of the published models in the recipes, so that a plan needs neither weights nor the hub.

The numbers stand in launch/templates/known_models.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import safe_yaml
from generator.family import PARTS, Family

FILE = Path(__file__).parents[1] / "templates" / "known_models.yaml"
_SIZES: dict[str, Any] = safe_yaml.parse(FILE.read_text(encoding="utf-8")).value
# Transformers by hub name, and the VAE and text encoder that all sizes of Wan 2.1 share.
WAN: dict[str, Any] = {}
for _name, _config in _SIZES["wan"].items():
    WAN[_name] = _SIZES["wan_common"] | _config
    # A flow map has always this norm, and no key for it.
    if "deltatime_type" in _config:
        del WAN[_name]["qk_norm"]
WAN_VAE = _SIZES["wan_vae"]
# Statistics of the latents do not change what a plan counts.
_WAN_VAE_TI2V = {
    **_SIZES["wan_vae_ti2v"],
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
UMT5_XXL = _SIZES["umt5_xxl"]

# Reward models by hub name, with what all sizes share and what follows from another key.
QWEN3_VL: dict[str, Any] = {}
for _name, _config in _SIZES["qwen3_vl"].items():
    _tied = _config["tie_word_embeddings"]
    _text = _SIZES["qwen3_vl_text"] | _config["text_config"]
    _vision = _SIZES["qwen3_vl_vision"] | _config["vision_config"]
    QWEN3_VL[_name] = {
        "tie_word_embeddings": _tied,
        "text_config": {
            "tie_word_embeddings": _tied,
            **_text,
        },
        "vision_config": {
            "out_hidden_size": _text["hidden_size"],
            **_vision,
        },
    }


def small_decoder(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Config of a decoder with TAESD's widths that fits a VAE; its encoder is as narrow as may be.

    A decoder has a stage for each doubling and one more.
    """
    doublings = int(vae["scale_factor_spatial"]).bit_length() - 1
    return {
        "_class_name": "AutoencoderTiny",
        "out_channels": 3 * vae["scale_factor_temporal"],
        "latent_channels": vae["z_dim"],
        "num_decoder_blocks": [3] * doublings + [1],
        "decoder_block_out_channels": [64] * (doublings + 1),
        "num_encoder_blocks": [1],
        "encoder_block_out_channels": [8],
    }


def wan_vae(name: str) -> dict[str, Any]:
    """Return the config of a published Wan's VAE."""
    channels = WAN[name]["out_channels"]
    return WAN_VAE if channels == WAN_VAE["z_dim"] else _WAN_VAE_TI2V


def wan_index(name: str) -> dict[str, Any]:
    """Return what a published Wan's model_index.json holds of its own."""
    return dict(_SIZES["wan_index"].get(name, {}))


def wan_family(path: str) -> Family:
    """Tell the family of a published Wan by its name, or of a folder by its files.

    For a name that is neither it is a single transformer: there is nothing to read.
    """
    if Path(path).is_dir():
        return Family.of(Path(path))
    if path not in WAN:
        return Family()
    index = {"_class_name": "WanPipeline", **wan_index(path)}
    for part, name in PARTS.items():
        index.setdefault(part, ["", name])
    # A flow map's transformer is of another class.
    transformer = {"_class_name": index["transformer"][1], **WAN[path]}
    configs = {"transformer": transformer, "vae": wan_vae(path)}
    if "transformer_2" in index:
        configs["transformer_2"] = transformer
    return Family.from_configs(index, configs)


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
