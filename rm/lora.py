"""LoRA on the language model of a judge: put on in place, switched off for a reference, merged for saving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from rm.config import BackboneLora

_LLM_LINEARS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)


def add_lora(backbone: nn.Module, lora: BackboneLora) -> None:
    """Put LoRA adapters on q, k, v, o, gate, up, down of every language layer, in place (module paths stay)."""
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_LLM_LINEARS,
        bias="none",
    )
    peft.inject_adapter_in_model(config, backbone)
