"""Weights in diffusers' layouts: the folder a generator comes from, and a transformer that was fine-tuned whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

SUBFOLDER = "transformer"
FILE = "diffusion_pytorch_model.safetensors"


def save(transformer: WanTransformer3DModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
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
        name.replace(".base_layer.", "."): parameter  # peft's name for a linear under an adapter
        for name, parameter in transformer.named_parameters()
        if ".lora_" not in name
    }
    problems = [f"unexpected {name}" for name in sorted(stored.keys() - own.keys())]
    problems += [f"missing {name}" for name in sorted(own.keys() - stored.keys())]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, want {tuple(own[name].shape)}"
        for name in sorted(own.keys() & stored.keys())
        if stored[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(f"the transformer in {folder} is another model ({len(problems)} problems): {shown}")
    for name, tensor in stored.items():
        own[name].copy_(tensor)


def of_one_dtype(transformer: WanTransformer3DModel, dtype: str) -> WanTransformer3DModel:
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
            raise FileNotFoundError(f"GeneratorConfig.path {path} is no WanPipeline folder: it has no model_index.json")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:  # a hub name is owner/name
        raise FileNotFoundError(f"GeneratorConfig.path {path} does not exist")
