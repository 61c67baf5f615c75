"""The low-rank adapter on the Wan transformer: attach, save, load. The maths is peft's, the file is diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.files import sort_header

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel
    from torch import Tensor

    from generator.config import LoraConfig

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for in a folder
_PREFIX = "transformer."  # the pipeline component that the weights belong to


def attach(
    transformer: WanTransformer3DModel, lora: LoraConfig, *, seed: int
) -> PeftModel:
    """Freeze `transformer` and put fp32 adapters on its linear layers. B is zero: the output does not change yet.

    A is drawn from `seed`, so that all ranks start from the same adapter. Raises ValueError when a target names no
    linear layer: peft passes over a misspelt one as long as another matches, and would train a part of the model.
    """
    import peft

    linears = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    unmatched = [
        t
        for t in lora.targets
        if not any(name == t or name.endswith(f".{t}") for name in linears)
    ]
    if unmatched:
        raise ValueError(
            f"LoraConfig.targets {unmatched} match no linear layer of the transformer"
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,  # a dropped unit would make the replayed log-prob differ from the sampled one
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    transformer.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            transformer, config
        )  # adapters over half-precision layers are made fp32
    trainable = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]
    if not trainable or any(
        parameter.dtype != torch.float32 for parameter in trainable
    ):
        raise RuntimeError(
            f"expected fp32 adapter weights to train, got {sorted({str(p.dtype) for p in trainable})}"
        )
    return model


def save(
    model: PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the adapter as one safetensors file that stock `WanPipeline.load_lora_weights(folder)` reads.

    The adapter's settings travel in the file's metadata: without them a reader takes alpha to be the rank, and the
    output is scaled wrongly. Weights are stored in fp32. Returns the file's path.

    state_dict  the model's, where its own weights are not whole; the adapter's are enough
    """
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(
        model, state_dict=None if state_dict is None else dict(state_dict)
    )
    settings = model.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers={
            _plain(name): w.detach().float().cpu().contiguous()
            for name, w in weights.items()
        },
        transformer_lora_adapter_metadata={
            "r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "target_modules": sorted(settings["target_modules"]),
        },
    )
    sort_header(Path(folder) / ADAPTER_FILE)
    return Path(folder) / ADAPTER_FILE


def load(model: PeftModel, folder: Path) -> None:
    """Copy a saved adapter's weights into the attached one, in place.

    Raises ValueError when names or shapes differ, or when the file's rank or alpha is not this adapter's: the same
    weights would then mean another model. Call it before an optimizer takes its fp32 copies of the weights.
    """
    import json

    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import safe_open

    own = {
        _plain(name): (name, tuple(weight.shape))
        for name, weight in get_peft_model_state_dict(model).items()
    }
    with safe_open(Path(folder) / ADAPTER_FILE, framework="pt") as file:
        names = file.keys()
        stored = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
        metadata = json.loads(
            (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        )
    problems = []
    config = model.peft_config["default"]
    for key, want in (("r", config.r), ("lora_alpha", config.lora_alpha)):
        got = metadata.get(_PREFIX + key)
        if got is not None and got != want:
            problems.append(f"{key} is {got}, want {want}")
    problems += [f"unexpected {name}" for name in sorted(stored.keys() - own.keys())]
    problems += [f"missing {name}" for name in sorted(own.keys() - stored.keys())]
    for name in sorted(own.keys() & stored.keys()):
        if tuple(stored[name].shape) != own[name][1]:
            problems.append(
                f"{name} is {tuple(stored[name].shape)}, want {own[name][1]}"
            )
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(
            f"the adapter in {folder} does not fit this model ({len(problems)} problems): {shown}"
        )
    set_peft_model_state_dict(
        model, {own[name][0]: weight for name, weight in stored.items()}
    )


def _plain(name: str) -> str:
    """A weight's name inside the transformer, without peft's wrapping."""
    return name.removeprefix("base_model.model.")
