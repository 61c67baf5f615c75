"""Which Wan a folder holds: facts from its JSON files, never from its name.

diffusers has a pipeline class for each kind of Wan, and loads many kinds into `WanPipeline` without
a word: the second transformer of a Wan 2.2 A14B would lie idle, an image would be ignored. What
this project does not run is refused here, before any weight is read. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.files import read_json

ImageInput = Literal["none", "channels", "channels+clip", "first_frame"]

INDEX = "model_index.json"
CONFIG = "config.json"
# Class of each part; the tokenizer's and the scheduler's differ between publications.
PARTS = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
IMAGE_PIPELINE = "WanImageToVideoPipeline"
# Publications of AnyFlow: the library's names, and those of the code that it came from.
FLOW_MAP_PIPELINES = ("AnyFlowPipeline", "WanAnyFlowPipeline")
FLOW_MAPS = ("AnyFlowTransformer3DModel", "FAR_Wan_Transformer3DModel")
SUPPORTED = (
    "this project runs Wan 2.1 T2V (such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, and 14B) and "
    "I2V-14B, Wan 2.2 T2V-A14B, I2V-A14B and TI2V-5B, and AnyFlow "
    "(nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers)"
)
# Kinds of pipelines, by a part of their class's name.
_KINDS = {
    "WanVACE": "a Wan VACE",
    "WanAnimate": "a Wan Animate",
    "WanVideoToVideo": "a video-to-video Wan",
    "AnyFlow": "an AnyFlow that generates in chunks",
}
# Settings of a transformer that only other kinds have.
_OTHER_TRANSFORMERS = {
    "pos_embed_seq_len": "is conditioned on a first and a last image (FLF2V)",
    "vace_layers": "is that of a Wan VACE",
    "vace_in_channels": "is that of a Wan VACE",
}
# Settings of a flow map, which takes two times.
_OF_FLOW_MAPS = ("deltatime_type", "gate_value")


@dataclass(frozen=True)
class Family:
    """What decides how a Wan is called.

    experts   folders of its transformers, that of high noise first
    boundary  the lowest sigma that is the first expert's; None for a single transformer
    image     how the image that a video begins with is told: not at all; by "channels" of its
              latent beside x; by "channels+clip", which adds tokens of a CLIP; or as the
              "first_frame" of the latent, which a prompt may leave out
    flow_map  whether the transformer takes two times (AnyFlow, `generator.flow_map`)
    """

    experts: tuple[str, ...] = ("transformer",)
    boundary: float | None = None
    image: ImageInput = "none"
    flow_map: bool = False

    @property
    def pipeline(self) -> str:
        """Class of the stock pipeline that the folder names."""
        if self.flow_map:
            return FLOW_MAP_PIPELINES[0]
        return IMAGE_PIPELINE if self.needs_image else "WanPipeline"

    @property
    def needs_image(self) -> bool:
        """Whether each prompt must have an image."""
        return self.image.startswith("channels")

    @property
    def text_length(self) -> int | None:
        """Tokens that a text must be padded to; None where any number will do.

        With CLIP's tokens attention cuts the last 512 tokens off as the text.
        """
        return 512 if self.image == "channels+clip" else None

    @staticmethod
    def of(folder: Path) -> Family:
        """Read a folder's JSON files; raise ValueError for a model that is not supported."""
        index = read_object(folder / INDEX)
        try:
            _check_index(index)
            configs = {"transformer": read_object(folder / "transformer" / CONFIG)}
            for part in ("transformer_2", "vae"):
                if (folder / part / CONFIG).is_file():
                    configs[part] = read_object(folder / part / CONFIG)
            return Family.from_configs(index, configs)
        except OtherModelError as error:
            raise ValueError(f"{folder} {error}; {SUPPORTED}") from None

    @staticmethod
    def from_configs(
        index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> Family:
        """Tell the family from model_index.json and the config.json of transformers and VAE.

        Raises OtherModelError that says what the model is, for one that is not supported.
        """
        _check_index(index)
        first = configs["transformer"]
        second = configs.get("transformer_2")
        flow_map = index.get("_class_name") in FLOW_MAP_PIPELINES
        image = _image_of(index, first, configs.get("vae"), flow_map=flow_map)

        # Two transformers, or one.
        boundary = index.get("boundary_ratio")
        named = class_of(index, "transformer_2")
        if named is None and second is None and boundary is None:
            return Family(image=image, flow_map=flow_map)
        if flow_map:
            raise OtherModelError("is a flow map with two transformers")
        if named != PARTS["transformer"] or second is None or boundary is None:
            raise OtherModelError(
                f"has a part of two transformers only: boundary_ratio {boundary}, transformer_2 of "
                f"class {named}, {'a' if second else 'no'} folder transformer_2"
            )
        _check_experts(index, first, second)
        return Family(("transformer", "transformer_2"), float(boundary), image)


class OtherModelError(ValueError):
    """A folder holds a model that this project does not run; the message says which."""


def _check_index(index: Mapping[str, Any]) -> None:
    """Raise OtherModelError unless an index is of a text-to-video or image-to-video Wan."""
    # The pipeline.
    name = index.get("_class_name")
    flow_map = name in FLOW_MAP_PIPELINES
    if name not in ("WanPipeline", IMAGE_PIPELINE) and not flow_map:
        for part, kind in _KINDS.items():
            if part in str(name):
                raise OtherModelError(f"is {kind} ({name})")
        raise OtherModelError(f"is a {name}")

    # The parts of the pipeline.
    for part, wanted in PARTS.items():
        found = class_of(index, part)
        known = FLOW_MAPS if flow_map and part == "transformer" else (wanted,)
        if found not in known:
            raise OtherModelError(
                f"has a {part} of class {found} instead of {known[0]}"
            )


def _image_of(
    index: Mapping[str, Any],
    config: Mapping[str, Any],
    vae: Mapping[str, Any] | None,
    *,
    flow_map: bool,
) -> ImageInput:
    """Tell how a transformer takes an image; raise OtherModelError where it takes something else.

    vae  None where a folder is for training on stored latents
    """
    name = config.get("_class_name")
    known = FLOW_MAPS if flow_map else (PARTS["transformer"],)
    if name not in known:
        raise OtherModelError(f"has a transformer of class {name}")
    for key in _OF_FLOW_MAPS:
        value = config.get(key)
        if (value is not None) != flow_map:
            raise OtherModelError(
                f"has a transformer with {key}={value!r}: a flow map (AnyFlow) has it, "
                "and no other Wan"
            )
    for key, kind in _OTHER_TRANSFORMERS.items():
        value = config.get(key)
        if value is not None:
            raise OtherModelError(f"has a transformer that {kind} ({key}={value!r})")

    # The transformer writes latents of the VAE.
    reads = config.get("in_channels", 16)
    writes = config.get("out_channels", 16)
    latent = writes
    temporal = 4
    if vae is not None:
        latent = vae.get("z_dim", 16)
        temporal = vae.get("scale_factor_temporal", 4)

    # It reads them alone, or beside a mask and the latent of an image.
    is_image_pipeline = index.get("_class_name") == IMAGE_PIPELINE
    takes_clip = config.get("image_dim") is not None
    if (reads, writes) == (latent, latent) and not is_image_pipeline and not takes_clip:
        return "first_frame" if index.get("expand_timesteps") else "none"
    if (reads, writes) == (2 * latent + temporal, latent) and is_image_pipeline:
        has_encoder = class_of(index, "image_encoder") == "CLIPVisionModel"
        if takes_clip != has_encoder:
            raise OtherModelError(
                f"has image_dim={config.get('image_dim')!r} and an image_encoder of class "
                f"{class_of(index, 'image_encoder')}, which belong together"
            )
        return "channels+clip" if takes_clip else "channels"
    raise OtherModelError(
        f"is a {index.get('_class_name')} whose transformer reads {reads} and writes {writes} "
        f"channels with image_dim={config.get('image_dim')!r}, and whose latents have {latent}"
    )


def _check_experts(
    index: Mapping[str, Any],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> None:
    """Raise OtherModelError unless two transformers of one shape share the way at a boundary."""
    boundary = index.get("boundary_ratio")
    is_number = isinstance(boundary, int | float) and not isinstance(boundary, bool)
    if not is_number or not 0 < boundary < 1:
        raise OtherModelError(
            f"has boundary_ratio={boundary!r}, want a sigma between 0 and 1"
        )
    if index.get("expand_timesteps"):
        raise OtherModelError(
            "has two transformers and expand_timesteps, which no Wan has together"
        )
    for key in sorted({*first, *second}):
        # the library's version, and the path where it was saved
        if not key.startswith("_") and first.get(key) != second.get(key):
            raise OtherModelError(
                f"has transformers of two shapes: {key} is {first.get(key)!r} and "
                f"{second.get(key)!r}"
            )


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
