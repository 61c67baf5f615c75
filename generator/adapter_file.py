"""Read a saved adapter without its model, rename it for ComfyUI, or merge it into weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.lora import LoraScales, LowRank, MergeLoss, low_ranks
from common.state_dicts import raise_problems, shapes_in, state_dict_problems
from common.strict_loading import require_finite, require_floats
from common.weight_files import load_safetensors, open_safetensors

# the file that `load_lora_weights` looks for in a folder
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# the component of the pipeline that the weights belong to
PREFIX = "transformer."
# The key of the file's metadata under which diffusers stores peft's settings.
METADATA = "lora_adapter_metadata"
# Settings of peft under which W + scaling B A would be wrong.
_OTHER_LORAS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "exclude_modules",
)
# Ways to begin that change the base weights, which the file does not hold.
_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "eva")
# A layer's name or its end. peft would read any regular expression.
_LAYER = re.compile(r"\^?[\w.]+")

# diffusers' names of linear layers -> the names in Wan's original code, which ComfyUI uses
_IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    # of the tokens of an image, in Wan 2.1 I2V
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA for each linear layer in ``pairs``, by its name in diffusers' transformer."""

    source: Path
    scales: LoraScales
    pairs: Mapping[str, LowRank]


@dataclass(frozen=True)
class Merged:
    """Weights with an adapter merged into them.

    lost  share of the change that rounding to the weights' dtype loses:
          |merged - (W + change)| / |change|, norms over all linear layers
    """

    state: dict[str, Tensor]
    lost: float


def read(folder: Path) -> StoredAdapter:
    """Read the file that `generator.adapter.save` wrote, or another LoRA in diffusers' layout.

    This is the only reader: sampling, training, evaluation and export give a file the same
    meaning, that of stock diffusers for a file with metadata.

    Raises ValueError, naming the file and the key or tensor, for a damaged file, NaN, an A without
    B, a rank that differs from the file's metadata, a kind of LoRA that is not supported, or a file
    without rank and alpha: diffusers would take alpha to be the rank, and whoever trained it may
    have meant another.
    """
    file = Path(folder) / ADAPTER_FILE
    tensors = load_safetensors(file)
    # Other programs have other layouts.
    for name in tensors:
        if not name.startswith(PREFIX):
            raise ValueError(
                f"{file}: {name} is not the A or B of a linear's LoRA in diffusers' layout, "
                f"{PREFIX}LAYER.lora_A.weight"
            )
    scales = read_scales(file)
    require_floats(tensors, file)
    require_finite(tensors, file)
    inside = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    pairs = low_ranks(
        inside,
        scales,
        source=file,
    )
    by_linear = {name.removesuffix(".weight"): pairs[name] for name in sorted(pairs)}
    return StoredAdapter(file, scales, by_linear)


def read_scales(file: Path) -> LoraScales:
    """Read rank and scaling from an adapter file's metadata. ValueError names the file."""
    settings = _settings(file)
    rank = settings.get(PREFIX + "r")
    alpha = settings.get(PREFIX + "lora_alpha")
    if not _is_rank(rank) or not _is_alpha(alpha):
        raise ValueError(
            f"{file} has no rank and alpha in its metadata ({METADATA}), so its scaling is "
            "unknown. Save it again with them: transformer_lora_adapter_metadata="
            "{'r': ..., 'lora_alpha': ...} of WanPipeline.save_lora_weights"
        )
    for key in _OTHER_LORAS:
        if settings.get(PREFIX + key):
            raise ValueError(f"{file}: {key} is not supported by this project's LoRA")

    start = str(settings.get(PREFIX + "init_lora_weights")).lower()
    if start.startswith(_OTHER_STARTS):
        raise ValueError(
            f"{file}: init_lora_weights={start} changes the base, which the file does not hold"
        )

    # Layers with a rank or an alpha of their own.
    patterns = {}
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = settings.get(PREFIX + key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{file}: {key} must map names of layers to numbers")
        for layer, value in pattern.items():
            if not _LAYER.fullmatch(layer) or not is_valid(value):
                raise ValueError(f"{file}: {key} has {layer!r}: {value!r}")
        patterns[key] = pattern
    use_rslora = settings.get(PREFIX + "use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise ValueError(
            f"{file}: use_rslora must be true or false, got {use_rslora!r}"
        )
    return LoraScales(rank, float(alpha), use_rslora, **patterns)


def _settings(file: Path) -> dict[str, object]:
    """The LoRA settings in an adapter file's metadata; empty where there are none."""
    with open_safetensors(file) as stored:
        metadata = stored.metadata() or {}
    text = metadata.get(METADATA, "{}")
    # A text that is nested without end exhausts the parser.
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: {METADATA} in its header is not JSON: {error}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: {METADATA} in its header is not a JSON object")
    return settings


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def require_fit(
    adapter: StoredAdapter, transformer_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless every linear layer of the adapter is in the transformer."""
    changed = {f"{linear}.weight": pair.shape for linear, pair in adapter.pairs.items()}
    # weights without LoRA are not compared
    wanted = {
        name: shape for name, shape in transformer_shapes.items() if name in changed
    }
    problems = state_dict_problems(changed, wanted)
    raise_problems(problems, f"{adapter.source} does not fit the transformer")


def comfyui(adapter: StoredAdapter) -> dict[str, Tensor]:
    """Rename the adapter to `diffusion_model.blocks.0.self_attn.q.lora_A.weight` and so on.

    Readers scale by alpha / rank where a linear layer has an `.alpha`, and by 1 otherwise. Layers
    in the blocks get an `.alpha`, scaling x rank, and their A and B stay as trained. In other
    layers B is multiplied instead, since diffusers' reader of this layout refuses an `.alpha`
    there. The file must carry no metadata of an adapter: diffusers would scale a second time by it.

    Raises ValueError for a linear layer without a name in Wan's original code.
    """
    # Rename, with alpha where its readers know it.
    out = {}
    for linear, pair in adapter.pairs.items():
        name = f"diffusion_model.{original_name(linear)}"
        b_OR = pair.b_OR
        if linear.startswith("blocks."):
            alpha = pair.scaling * len(pair.a_RI)
            out[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        else:
            b_OR = b_OR * pair.scaling
        out[f"{name}.lora_A.weight"] = pair.a_RI.contiguous()
        out[f"{name}.lora_B.weight"] = b_OR.contiguous()
    return out


def original_name(linear: str) -> str:
    """Translate a name of diffusers' transformer to Wan's original code.

    Raises ValueError for a layer that the original code does not have.
    """
    name = _OUTSIDE.get(linear)
    # blocks.N.LINEAR
    parts = linear.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        # All blocks have the same linear layers.
        inner = _IN_BLOCK.get(parts[2])
        if inner is not None:
            name = f"blocks.{parts[1]}.{inner}"
    if name is None:
        raise ValueError(f"{linear} has no name in Wan's original code")
    return name


@torch.no_grad()
def merge(base: Mapping[str, Tensor], adapter: StoredAdapter) -> Merged:
    """Merge: W + scaling B A in fp32, stored in W's dtype; other weights stay as they are.

    Raises ValueError when the adapter belongs to another model, or a merged weight overflows.
    """
    require_fit(adapter, shapes_in(base))
    # Weights without an adapter are not copied.
    state = dict(base)
    loss = MergeLoss()
    for linear, pair in adapter.pairs.items():
        name = f"{linear}.weight"
        state[name] = loss.merge(base[name], pair, name=f"{name} of {adapter.source}")
    return Merged(state, loss.share)
