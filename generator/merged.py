"""Sample with the adapter merged into a copy of the weights, at the cost of the base model.

By a roofline the adapter's products are a third of a full-size forward. Sampling can do without
them: each target's weight is replaced by W + scaling B A for the time of a walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from common.lora import adapter_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

# peft's name of the adapter that `generator.adapter.attach` makes
ADAPTER = "default"


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Return W + scaling B A (O, I) of a layer: computed in fp32, rounded ONCE to W's dtype.

    On CUDA with `GeneratorConfig.tf32` the factors of B A are rounded to TF32.

    Raises ValueError when this rank holds a part of W only (ZeRO 3).
    """
    weight_OI = layer.base_layer.weight
    # DeepSpeed's mark of a weight that it splits over the ranks
    if hasattr(weight_OI, "ds_id"):
        raise ValueError(
            "generator.sampler.merge_adapter needs whole weights, which zero_stage 3 splits; "
            "use zero_stage 1 or 2, or merge_adapter=false"
        )
    merged_OI = torch.addmm(
        weight_OI.float(),
        layer.lora_B[ADAPTER].weight.float(),
        layer.lora_A[ADAPTER].weight.float(),
        alpha=layer.scaling[ADAPTER],
    )
    return merged_OI.to(weight_OI.dtype)


class MergedAdapter:
    """Copies of the targets' weights with the adapter added; they take the base's place in a block.

    The base is set aside and put back, never subtracted from, so it stays the same bit for bit.
    Biases, norms and all other weights are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = adapter_layers(model)
        self.copies: list[Tensor] = []
        self.in_use = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Merge the adapter of now; inside, `applied` has copies to use, which are freed after.

        Training the adapter inside would not change the copies. May be nested.
        """
        if self.copies:
            yield
            return
        try:
            for layer in self.layers:
                self.copies.append(merged_weight(layer))
            yield
        finally:
            self.copies = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the layers compute with the copies and skip the adapter's products.

        Nothing changes outside of `held`. For calls without gradient only.
        """
        if not self.copies or self.in_use:
            yield
            return
        weights = [layer.base_layer.weight for layer in self.layers]
        bases = [weight.data for weight in weights]
        switched_off = [layer.disable_adapters for layer in self.layers]
        self.in_use = True
        try:
            # Parameters stay the same objects: hooks, optimizers and names see no difference.
            for layer, weight, copy_OI in zip(
                self.layers, weights, self.copies, strict=True
            ):
                weight.data = copy_OI
                layer._disable_adapters = True
            yield
        finally:
            for layer, weight, base_OI, was_off in zip(
                self.layers, weights, bases, switched_off, strict=True
            ):
                weight.data = base_OI
                layer._disable_adapters = was_off
            self.in_use = False
