"""LoRA on the language model of a judge: put on in place, switched off for a reference, merged for saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from rm.config import LoraConfig

_LLM_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def add_lora(backbone: nn.Module, lora: LoraConfig) -> None:
    """Put LoRA adapters on q, k, v, o, gate, up, down of every language layer, in place (module paths stay)."""
    import peft

    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_LLM_LINEARS, bias="none"
    )
    peft.inject_adapter_in_model(config, backbone)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its LoRA, inside the block. ValueError if it has none: it would be its own reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("the model has no adapter to switch off; give a frozen copy as the reference")
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def merged_backbone(backbone: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The backbone's weights under their stock names, W + scaling B A computed in fp32 and stored in ``dtype``."""
    merged = {}
    for name, tensor in state.items():
        if not name.startswith("backbone.") or ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer = name.partition(".base_layer.")[0]
            a, b = (state.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
            if a is not None and name.endswith(".weight"):
                scaling = backbone.get_submodule(layer.removeprefix("backbone.")).scaling["default"]
                tensor = tensor.float() + scaling * (b.float() @ a.float())
        merged[name.removeprefix("backbone.").replace(".base_layer.", ".")] = tensor.detach().to(dtype).cpu()
    return merged
