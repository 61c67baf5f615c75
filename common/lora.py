"""LoRA layers: pair the A and B matrices of a file, switch adapters off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
WRAPPERS = ("module.", "_fsdp_wrapped_module.", "base_model.model.")


@dataclass(frozen=True)
class LowRank:
    """The change that LoRA makes to a weight (O, I): scaling * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), the shape of the weight."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def change(self) -> Tensor:
        """scaling * B A in fp32, (O, I)."""
        return self.scaling * (self.b_OR.float() @ self.a_RI.float())


def low_ranks(
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    source: Path,
) -> dict[str, LowRank]:
    """Pair the A and B matrices of a file -> stock name of each weight and its change.

    The scaling is alpha / rank. Raises ValueError, naming ``source``, for an empty file, a tensor
    that is not the A or B of a linear layer, an A without B, or another rank.
    """
    # 1. Collect the two matrices of each layer.
    if not tensors:
        raise ValueError(f"{source} is empty")
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = LORA_NAME.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise ValueError(f"{source}: {key} is not the A or B of a linear's LoRA")
        matrices.setdefault(f"{stock_name(match[1])}.weight", {})[match[2]] = tensor

    # 2. Check that they fit each other.
    pairs = {}
    for name, layer in matrices.items():
        complete = set(layer) == {"A", "B"}
        if not complete or not layer["A"].shape[0] == layer["B"].shape[1] == rank:
            shapes = {side: tuple(tensor.shape) for side, tensor in layer.items()}
            raise ValueError(
                f"{source}: {name} has {shapes}, r={rank} wants A (r, in) and B (out, r)"
            )
        pairs[name] = LowRank(layer["A"], layer["B"], alpha / rank)
    return pairs


def stock_name(key: str) -> str:
    """Remove from a weight's name what wrappers added: peft, DDP, FSDP."""
    # Wrappers may be nested, in this order.
    for prefix in WRAPPERS:
        key = key.removeprefix(prefix)
    return key.replace(".base_layer.", ".")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the model's LoRA layers off inside the block.

    Raises ValueError if it has none: the model would be its own reference.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer)
    ]
    if not layers:
        raise ValueError(
            "the model has no adapter to switch off; give a frozen copy as the reference"
        )
    # peft's `disable_adapter` also toggles requires_grad of every weight, which took a tenth of
    # a small model's update
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off
