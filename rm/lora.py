"""LoRA adapters on the language model of the reward model's backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from rm.config import BackboneLora

_LLM_LINEARS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)


def add_lora(backbone: nn.Module, lora: BackboneLora) -> None:
    """Add LoRA to q, k, v, o, gate, up, down of every language layer, in place.

    The paths of the modules stay the same.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_LLM_LINEARS,
        bias="none",
    )
    peft.inject_adapter_in_model(config, backbone)
