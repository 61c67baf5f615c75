"""Which Wan a folder holds: facts from its JSON files, never from its name.

diffusers has a pipeline class for each kind of Wan, and loads many kinds into `WanPipeline` without
a word: the second transformer of a Wan 2.2 A14B would be used or lie idle, an image ignored. What
this project does not run is refused here, before any weight is read. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json

INDEX = "model_index.json"
CONFIG = "config.json"
# Class of each part; the tokenizer's and the scheduler's differ between publications.
PARTS = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
SUPPORTED = (
    "this project runs text-to-video folders of Wan 2.1: WanPipeline with a single "
    "WanTransformer3DModel, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
)
# Kinds of pipelines, by a part of their class's name.
_KINDS = {
    "WanImageToVideo": "an image-to-video Wan",
    "WanVACE": "a Wan VACE",
    "WanAnimate": "a Wan Animate",
    "WanVideoToVideo": "a video-to-video Wan",
    "AnyFlow": "an AnyFlow, a flow map that takes two times",
}
# Settings of a transformer that only other kinds have.
_OTHER_TRANSFORMERS = {
    "image_dim": "is conditioned on an image",
    "added_kv_proj_dim": "is conditioned on an image",
    "pos_embed_seq_len": "is conditioned on an image",
    "vace_layers": "is that of a Wan VACE",
    "vace_in_channels": "is that of a Wan VACE",
    "deltatime_type": "is a flow map (AnyFlow), which takes two times",
    "gate_value": "is a flow map (AnyFlow), which takes two times",
}


@dataclass(frozen=True)
class Family:
    """What decides how a Wan is called.

    pipeline  class of the stock pipeline that samples from it
    experts   folders of its transformers
    """

    pipeline: str = "WanPipeline"
    experts: tuple[str, ...] = ("transformer",)

    @staticmethod
    def of(folder: Path) -> Family:
        """Read a folder's JSON files; raise ValueError for a model that is not supported."""
        what = _other_kind(folder)
        if what is not None:
            raise ValueError(f"{folder} {what}; {SUPPORTED}")
        return Family()


def _other_kind(folder: Path) -> str | None:
    """Say what a folder is if it is no text-to-video Wan 2.1."""
    index = read_object(folder / INDEX)
    # The pipeline.
    name = index.get("_class_name")
    if name != "WanPipeline":
        for part, kind in _KINDS.items():
            if part in str(name):
                return f"is {kind} ({name})"
        return f"is a {name}"

    # Parts and settings of the pipeline.
    if (
        class_of(index, "transformer_2")
        or index.get("boundary_ratio") is not None
        or (folder / "transformer_2").is_dir()
    ):
        return "has two transformers, of which each denoises a part of the way (Wan 2.2 A14B)"
    if index.get("expand_timesteps"):
        return "gives every token its own time (expand_timesteps, Wan 2.2 TI2V-5B)"
    if class_of(index, "image_encoder"):
        return "has an image encoder, so it is conditioned on an image"
    for part, wanted in PARTS.items():
        found = class_of(index, part)
        if found != wanted:
            return f"has a {part} of class {found} instead of {wanted}"
    return _other_transformer(folder)


def _other_transformer(folder: Path) -> str | None:
    """Say what a folder is if its transformer or VAE is not that of a text-to-video Wan 2.1."""
    transformer = read_object(folder / "transformer" / CONFIG)
    name = transformer.get("_class_name")
    if name != PARTS["transformer"]:
        return f"has a transformer of class {name}"
    for key, kind in _OTHER_TRANSFORMERS.items():
        if transformer.get(key) is not None:
            return f"has a transformer that {kind} ({key}={transformer[key]!r})"

    # The transformer reads and writes latents of the VAE, and nothing else.
    channels = (transformer.get("in_channels", 16), transformer.get("out_channels", 16))
    latent = 16
    # Training on stored latents needs no VAE.
    vae_file = folder / "vae" / CONFIG
    if vae_file.is_file():
        latent = read_object(vae_file).get("z_dim", 16)
    if channels == (48, 48) and latent == 48:
        return "has latents of 48 channels (Wan 2.2 TI2V-5B)"
    if channels != (latent, latent):
        return (
            f"has a transformer that reads {channels[0]} and writes {channels[1]} channels, but "
            f"latents of {latent}: it is conditioned on something else than text"
        )
    return None


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a part in model_index.json; None where it is left out, [null, null]."""
    value = index.get(part)
    if isinstance(value, list) and len(value) == 2:
        return value[1]
    return None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. FileNotFoundError or ValueError name the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a folder of a Wan has it")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content
