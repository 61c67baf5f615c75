"""LoRA's two sides as files hold them, apart, put together again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def both_sides(
    found: Iterable[tuple[str, str, Tensor]], *, rank: int, source: Path
) -> dict[str, dict[str, Tensor]]:
    """(name of a linear, "A" or "B", tensor) in any order -> {"A": (rank, in), "B": (out, rank)} of each linear.

    ValueError, naming ``source``, for no linear at all, a lone side, or another rank.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, side, tensor in found:
        sides.setdefault(name, {})[side] = tensor
    if not sides:
        raise ValueError(f"{source} is empty")
    for name, own in sides.items():
        if (
            set(own) != {"A", "B"}
            or own["A"].shape[0] != rank
            or own["B"].shape[1] != rank
        ):
            shapes = {side: tuple(tensor.shape) for side, tensor in own.items()}
            raise ValueError(
                f"{source}: {name} has {shapes}, r={rank} wants A (r, in) and B (out, r)"
            )
    return sides


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its LoRA, inside the block. ValueError if it has none: it would be its own reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer)
    ]
    if not layers:
        raise ValueError(
            "the model has no adapter to switch off; give a frozen copy as the reference"
        )
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def merged_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The backbone's weights under their stock names, W + scaling B A computed in fp32 and stored in ``dtype``."""
    merged = {}
    for name, tensor in state.items():
        if not name.startswith("backbone.") or ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer = name.partition(".base_layer.")[0]
            a, b = (state.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
            if a is not None and name.endswith(".weight"):
                scaling = backbone.get_submodule(
                    layer.removeprefix("backbone.")
                ).scaling["default"]
                tensor = tensor.float() + scaling * (b.float() @ a.float())
        merged[name.removeprefix("backbone.").replace(".base_layer.", ".")] = (
            tensor.detach().to(dtype).cpu()
        )
    return merged


@contextmanager
def switched_off(model: PeftModel) -> Iterator[None]:
    """Inside, the model is its base. peft's own `disable_adapter` also turns every weight's requires_grad off and on
    again, which took a tenth of a small model's update.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer)
    ]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def stock_name(key: str) -> str:
    """Without what wrappers put into a name: peft, DDP, FSDP."""
    for prefix in ("module.", "_fsdp_wrapped_module.", "base_model.model."):
        key = key.removeprefix(prefix)
    return key.replace(".base_layer.", ".")


LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to a weight (O, I): scaling * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    def change(self) -> Tensor:
        return self.scaling * (self.b_OR.float() @ self.a_RI.float())


def low_ranks(
    tensors: Mapping[str, Tensor], *, rank: int, alpha: float, source: Path
) -> dict[str, LowRank]:
    """Stock name of a weight -> what LoRA adds to it; the scaling is alpha / rank.

    ValueError, naming ``source``, for a tensor that is no A or B of a linear, a lone side, or another rank.
    """
    found = []
    for key, tensor in tensors.items():
        if (match := LORA_NAME.fullmatch(key)) is None:
            raise ValueError(f"{source}: {key} is not the A or B of a linear's LoRA")
        found.append((f"{stock_name(match[1])}.weight", match[2], tensor))
    sides = both_sides(found, rank=rank, source=source)
    return {
        name: LowRank(own["A"], own["B"], alpha / rank) for name, own in sides.items()
    }
