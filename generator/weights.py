"""Transformer weights in diffusers' layout: save, load, check, and write in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import give_usual_mode, read_json
from common.state_dicts import (
    Shapes,
    raise_problems,
    shapes_in,
    state_dict_problems,
)
from common.strict_loading import require_finite
from common.weight_files import load_safetensors, tensor_places

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

SUBFOLDER = "transformer"
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
CONFIG = "config.json"
# diffusers' default: Wan 2.1 1.3B is a single file, in fp32 too
MAX_SHARD = "10GB"


@dataclass(frozen=True)
class Stored:
    """A transformer as read from files: its config.json, and its weights in their stored dtypes."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def save(
    transformer: WanTransformer3DModel,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write folder/transformer, for stock `from_pretrained(folder, subfolder="transformer")`.

    ``state_dict`` replaces the state of the module (gathered from its shards). Returns the file of
    the weights.
    """
    from safetensors.torch import save_file

    target = Path(folder) / SUBFOLDER
    # the folder is made with config.json
    transformer.save_config(target)
    state = transformer.state_dict() if state_dict is None else state_dict
    # Tied or strided tensors are written as they are seen.
    on_cpu = {
        name: weight.detach().cpu().contiguous() for name, weight in state.items()
    }
    save_file(on_cpu, target / FILE, metadata={"format": "pt"})
    give_usual_mode(target / FILE)
    return target / FILE


def is_whole(folder: Path) -> bool:
    """True for a folder that `save` wrote."""
    return (Path(folder) / SUBFOLDER / FILE).is_file()


@torch.no_grad()
def load(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Copy what `save` wrote into the transformer, in place; an adapter on it stays as it is.

    Raises ValueError when the file is damaged, names or shapes differ, or a number is NaN.
    """
    file = Path(folder) / SUBFOLDER / FILE
    stored = load_safetensors(file)
    parameters = {}
    for name, parameter in transformer.named_parameters():
        if ".lora_" not in name:
            # peft's name for a linear layer under an adapter
            parameters[name.replace(".base_layer.", ".")] = parameter
    # Check all before anything is overwritten.
    _require_same(shapes_in(stored), shapes_in(parameters), folder)
    require_finite(stored, file)
    for name, tensor in stored.items():
        parameters[name].copy_(tensor)


def read(folder: Path, part: str = SUBFOLDER) -> Stored:
    """Read folder/transformer, or another part, from a single file or from shards.

    Raises FileNotFoundError, naming what is missing, and ValueError when a file is damaged, a
    number is NaN, or the weights do not match config.json.
    """
    place = Path(folder) / part
    config = read_config(folder, part)
    # Every shard holds other weights.
    places = tensor_places(place, FILE)
    state = {}
    for file in sorted(set(places.values())):
        state |= load_safetensors(file)
    _require_same(shapes_in(state), shapes_of(config), place)
    require_finite(state, place, places)
    return Stored(config, state)


def read_config(folder: Path, part: str = SUBFOLDER) -> dict[str, Any]:
    """Read a Wan transformer's config.json; FileNotFoundError, or ValueError for other models."""
    file = Path(folder) / part / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a folder with a Wan transformer has it"
        )
    config = read_json(file)
    # Wan's other transformers have the same layout of files.
    kind = config.get("_class_name")
    if kind != "WanTransformer3DModel":
        raise ValueError(f"{file} is of a {kind}, not of a WanTransformer3DModel")
    # a path of the machine that saved it
    config.pop("_name_or_path", None)
    return config


def write(
    transformer: Stored,
    folder: Path,
    *,
    part: str = SUBFOLDER,
    max_shard: int | str = MAX_SHARD,
) -> list[Path]:
    """Write folder/transformer, or another part, and return the files of its weights.

    They are shards of at most ``max_shard`` bytes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    place = Path(folder) / part
    place.mkdir(parents=True, exist_ok=True)
    _write_json(place / CONFIG, transformer.config)
    # The hub's library decides which weights share a file.
    pattern = FILE.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        transformer.state,
        filename_pattern=pattern,
        max_shard_size=max_shard,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: transformer.state[name].contiguous() for name in names}
        save_file(shard, place / file, metadata={"format": "pt"})
        give_usual_mode(place / file)
    # a single file needs no index
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(place / INDEX, index)
    return [place / file for file in split.filename_to_tensors]


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(
        value,
        indent=2,
        sort_keys=True,
    )
    file.write_text(text + "\n", encoding="utf-8")


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a transformer with this config.json, without memory."""
    from diffusers import WanTransformer3DModel

    # shapes only, no numbers
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(dict(config))
    return shapes_in(dict(model.named_parameters()))


def _require_same(stored: Shapes, wanted: Shapes, folder: Path) -> None:
    problems = state_dict_problems(stored, wanted)
    raise_problems(problems, f"the transformer in {folder} is another model")


def of_one_dtype(
    transformer: WanTransformer3DModel, dtype: str
) -> WanTransformer3DModel:
    """Convert all weights to ``dtype``, since DeepSpeed trains a single dtype.

    diffusers keeps norms and modulations in fp32. They go on computing in fp32, and buffers keep
    their dtype.
    """
    # Only storage is converted; the modules stay the same.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return transformer
