"""Keys and values of a language model in buffers that have room for the next tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

# Buffers grow by so many slots: a longer cache is copied once a block and not once a token.
BLOCK = 256


class KvCache:
    """Keys and values (R, heads, slots, channels) of every layer, for R sequences.

    transformers' DynamicCache copies all of itself for every token. Here a new token is written
    behind the others, and attention reads a view. The numbers are the same.

    used   The slots that are filled. `advance` sets it after a forward.
    slots  The slots that there is memory for.
    whole  False hands attention the filled slots: an exact shape, which grows with each token.
           True hands it all slots and writes at ``slot_1``, a number on the device. Then every
           token runs the same kernels on the same memory, as a CUDA graph needs, and the mask
           has to hide the slots that are not filled.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        used: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.used = used
        self.whole = False
        self.slot_1 = torch.tensor([used], device=keys[0].device)

    @classmethod
    def of_prompts(
        cls,
        cache: DynamicCache,
        copies: int,
        slots: int,
    ) -> KvCache:
        """Take over the cache of a forward of prompts, with ``copies`` rows for each of its rows.

        Layer by layer, and the layers of ``cache`` are freed on the way.
        """
        used = cache.get_seq_length()
        keys = []
        values = []
        for layer in cache.layers:
            keys.append(_spread(layer.keys, copies, slots))
            layer.keys = None
            values.append(_spread(layer.values, copies, slots))
            layer.values = None
        return cls(keys, values, used)

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def update(
        self,
        key_RHLC: Tensor,
        value_RHLC: Tensor,
        layer: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write L new slots of a layer, and return its keys and values to attend to.

        transformers' attention calls it in each layer. ``whole`` takes a single slot.
        """
        keys = self.keys[layer]
        values = self.values[layer]
        # All slots, at a place that only the device knows.
        if self.whole:
            keys.index_copy_(2, self.slot_1, key_RHLC)
            values.index_copy_(2, self.slot_1, value_RHLC)
            return keys, values

        # The filled slots, by views.
        start = self.used
        end = start + key_RHLC.shape[2]
        keys[:, :, start:end] = key_RHLC
        values[:, :, start:end] = value_RHLC
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Keep the last ``tokens`` that were written; the next ones come behind them."""
        self.used += tokens

    def cut(self, used: int) -> None:
        """Forget what is behind ``used`` slots."""
        self.used = used

    def reserve(self, tokens: int) -> bool:
        """Make room for so many more tokens. True if the buffers have moved for it."""
        needed = self.used + tokens
        if needed <= self.slots:
            return False
        # Buffer by buffer, so that memory for a single one more is enough.
        slots = rounded_up(needed)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                filled = buffer[:, :, : self.used]
                buffers[i] = _spread(filled, 1, slots)
        return True

    def bytes_to_reserve(self, tokens: int) -> int:
        """Bytes by which the buffers grow for so many more tokens."""
        needed = self.used + tokens
        if needed <= self.slots:
            return 0
        more = rounded_up(needed) - self.slots
        total = 0
        for buffer in (*self.keys, *self.values):
            total += more * (buffer.nbytes // self.slots)
        return total

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        device = self.slot_1.device
        row_R = torch.tensor(rows, device=device)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer[row_R]


def rounded_up(slots: int) -> int:
    """The next number of slots that buffers have."""
    blocks = math.ceil(slots / BLOCK)
    return blocks * BLOCK


def _spread(tensor_BHLC: Tensor, copies: int, slots: int) -> Tensor:
    """A buffer (B * copies, H, slots, C) that starts with the given slots, then zeros.

    Zeros, because attention multiplies what it does not see by 0, and 0 * NaN is NaN.
    """
    rows, heads, used, channels = tensor_BHLC.shape
    buffer = tensor_BHLC.new_zeros(
        rows * copies,
        heads,
        slots,
        channels,
    )
    # Every copy of a row gets the row.
    filled = buffer[:, :, :used]
    filled = filled.unflatten(0, (rows, copies))
    filled.copy_(tensor_BHLC.unsqueeze(1))
    return buffer
