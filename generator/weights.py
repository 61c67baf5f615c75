"""Weights in diffusers' layouts: the folder a generator comes from, and a transformer that was fine-tuned whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import require_hub_name

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

SUBFOLDER = "transformer"
FILE = "diffusion_pytorch_model.safetensors"
INDEX, CONFIG = f"{FILE}.index.json", "config.json"
MAX_SHARD = "10GB"  # diffusers' own limit: Wan 2.1 1.3B is one file, in fp32 too


@dataclass(frozen=True)
class Stored:
    """A transformer as files: its config.json, without the folder that it was once loaded from, and all its weights in
    the dtypes they have there.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


def save(
    transformer: WanTransformer3DModel,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write folder/transformer for stock `WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")`.

    state_dict  whole weights, where the module's own lie in pieces. Returns the weights' file.
    """
    from safetensors.torch import save_file

    target = Path(folder) / SUBFOLDER
    transformer.save_config(target)
    state = transformer.state_dict() if state_dict is None else state_dict
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, target / FILE, metadata={"format": "pt"})
    return target / FILE


def is_whole(folder: Path) -> bool:
    """True for a folder that `save` wrote."""
    return (Path(folder) / SUBFOLDER / FILE).is_file()


@torch.no_grad()
def load(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Copy what `save` wrote into the transformer, in place; an adapter on it stays as it is.

    Raises ValueError when names or shapes differ.
    """
    from safetensors.torch import load_file

    stored = load_file(Path(folder) / SUBFOLDER / FILE)
    own = {
        name.replace(
            ".base_layer.", "."
        ): parameter  # peft's name for a linear under an adapter
        for name, parameter in transformer.named_parameters()
        if ".lora_" not in name
    }
    _require_same(shapes(stored), shapes(own), source=Path(folder))
    for name, tensor in stored.items():
        own[name].copy_(tensor)


def read(folder: Path) -> Stored:
    """folder/transformer, in one file or in shards. FileNotFoundError names what is missing; ValueError when the
    weights are not those that config.json asks for.
    """
    from safetensors.torch import load_file

    place, config = Path(folder) / SUBFOLDER, read_config(folder)
    names = [FILE]
    if not (place / FILE).is_file():
        if not (place / INDEX).is_file():
            raise FileNotFoundError(
                f"{place} has no weights: it lacks {FILE} and {INDEX}"
            )
        names = sorted(
            set(
                json.loads((place / INDEX).read_text(encoding="utf-8"))[
                    "weight_map"
                ].values()
            )
        )
    if missing := [name for name in names if not (place / name).is_file()]:
        raise FileNotFoundError(
            f"{place} lacks {', '.join(missing)}, which {INDEX} names"
        )
    state = {
        name: tensor
        for file in names
        for name, tensor in load_file(place / file).items()
    }
    _require_same(shapes(state), shapes_of(config), source=Path(folder))
    return Stored(config, state)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of `Stored`. FileNotFoundError, or ValueError for another model's."""
    file = Path(folder) / SUBFOLDER / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a folder with a Wan transformer has one"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_class_name") != "WanTransformer3DModel":
        raise ValueError(
            f"{file} is of a {config.get('_class_name')}, not of a WanTransformer3DModel"
        )
    config.pop("_name_or_path", None)
    return config


def write(
    transformer: Stored, folder: Path, *, max_shard: int | str = MAX_SHARD
) -> list[Path]:
    """folder/transformer as `save` writes it, in shards of at most ``max_shard`` bytes. Returns the weights' files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    place = Path(folder) / SUBFOLDER
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).write_text(
        json.dumps(transformer.config, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )
    pattern = FILE.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        transformer.state, filename_pattern=pattern, max_shard_size=max_shard
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: transformer.state[name].contiguous() for name in names}
        save_file(shard, place / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (place / INDEX).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return [place / file for file in split.filename_to_tensors]


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a transformer with this config.json. Takes no memory."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return shapes(
            dict(WanTransformer3DModel.from_config(dict(config)).named_parameters())
        )


def _require_same(
    found: Mapping[str, tuple[int, ...]],
    want: Mapping[str, tuple[int, ...]],
    *,
    source: Path,
) -> None:
    problems = [f"unexpected {name}" for name in sorted(found.keys() - want.keys())]
    problems += [f"missing {name}" for name in sorted(want.keys() - found.keys())]
    problems += [
        f"{name} is {found[name]}, want {want[name]}"
        for name in sorted(want.keys() & found.keys())
        if found[name] != want[name]
    ]
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(
            f"the transformer in {source} is another model ({len(problems)} problems): {shown}"
        )


def of_one_dtype(
    transformer: WanTransformer3DModel, dtype: str
) -> WanTransformer3DModel:
    """Norms and modulations, which diffusers keeps in fp32, in ``dtype`` as well: DeepSpeed trains one dtype. They go
    on computing in fp32, and buffers stay as they are.
    """
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return transformer


def require_folder(path: str) -> None:
    """Say plainly that a folder is missing: `from_pretrained` takes the path for a hub name and asks the network."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"GeneratorConfig.path {path} is no WanPipeline folder: it has no model_index.json"
            )
    else:
        require_hub_name(path, "model_index.json")
