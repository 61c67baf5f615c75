"""LoRA layers: pair the A and B matrices of a file, merge them, switch adapters off."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass
class MergeLoss:
    """What rounding takes of an adapter: |merged - (W + change)| / |change| over all layers."""

    lost: float = 0.0
    total: float = 0.0

    def merge(
        self, weight_OI: Tensor, pair: LowRank, *, name: str = "a weight"
    ) -> Tensor:
        """Return W + change, added in fp32 and stored in W's dtype, and count what is lost.

        Raises ValueError, with the name, when W's dtype cannot hold the result.
        """
        change_OI = pair.change()
        exact_OI = weight_OI.float() + change_OI
        merged_OI = exact_OI.to(weight_OI.dtype)
        if not merged_OI.isfinite().all():
            raise ValueError(f"merging {name} gives numbers beyond {weight_OI.dtype}")
        self.add(change_OI, exact_OI, merged_OI)
        return merged_OI

    def add(self, change_OI: Tensor, exact_OI: Tensor, merged_OI: Tensor) -> None:
        """Count a layer, in fp64."""
        self.lost += float((merged_OI.float() - exact_OI).double().square().sum())
        self.total += float(change_OI.double().square().sum())

    @property
    def share(self) -> float:
        """The relative error; 0 without a change."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0


@dataclass(frozen=True)
class LoraScales:
    """Rank and scaling of each layer of a LoRA, as peft's config states them.

    use_rslora     the scaling is alpha / sqrt(rank) instead of alpha / rank
    rank_pattern   ranks of layers that differ, by the end of a layer's name
    alpha_pattern  alphas of layers that differ, likewise
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, for example blocks.0.attn1.to_q."""
        return _by_name(self.rank_pattern, layer, self.rank)

    def scaling_of(self, layer: str) -> float:
        """The factor before B A."""
        rank = self.rank_of(layer)
        alpha = _by_name(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_name(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first key that is the layer's name or, after a dot, its end.

    A key that starts with ^ is the whole name.
    """
    for key, value in pattern.items():
        is_name = key.startswith("^") and layer == key[1:]
        if is_name or f".{layer}".endswith(f".{key}"):
            return value
    return default


def low_ranks(
    tensors: Mapping[str, Tensor],
    scales: LoraScales,
    *,
    source: Path,
) -> dict[str, LowRank]:
    """Pair the A and B matrices of a file -> stock name of each weight and its change.

    Raises ValueError, naming ``source``, for an empty file, a tensor that is not the A or B of a
    linear layer, an A without B, or another rank.
    """
    # 1. Collect the two matrices of each layer.
    if not tensors:
        raise ValueError(f"{source} is empty")
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = LORA_NAME.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise ValueError(f"{source}: {key} is not the A or B of a linear's LoRA")
        matrices.setdefault(stock_name(match[1]), {})[match[2]] = tensor

    # 2. Check that they fit each other.
    pairs = {}
    for layer, sides in matrices.items():
        rank = scales.rank_of(layer)
        complete = set(sides) == {"A", "B"}
        if not complete or not sides["A"].shape[0] == sides["B"].shape[1] == rank:
            shapes = {side: tuple(tensor.shape) for side, tensor in sides.items()}
            raise ValueError(
                f"{source}: {layer}.weight has {shapes}, r={rank} wants A (r, in) and B (out, r)"
            )
        scaling = scales.scaling_of(layer)
        pairs[f"{layer}.weight"] = LowRank(sides["A"], sides["B"], scaling)
    return pairs


def stock_name(key: str) -> str:
    """Remove from a weight's name what wrappers added: peft, DDP, FSDP."""
    # Wrappers may be nested, in this order.
    for prefix in WRAPPERS:
        key = key.removeprefix(prefix)
    return key.replace(".base_layer.", ".")


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers with an adapter, in the order of the model's modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the model's LoRA layers off inside the block.

    Raises ValueError if it has none: the model would be its own reference.
    """
    layers = adapter_layers(model)
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
