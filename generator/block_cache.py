"""Feature caching: what a transformer's middle blocks add changes little between neighbouring steps of a walk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor


class Middle(nn.Module):
    """All blocks but the first and the last, as one. ``added`` is what they added to their input at the last full call.

    With ``again`` they are left out and ``added`` is added once more: h + added instead of blocks(h).
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.added: Tensor | None = None
        self.again = False

    def forward(self, hidden: Tensor, *conditions: Any) -> Tensor:
        if self.again and self.added is not None:
            return hidden + self.added
        out = hidden
        for block in self.blocks:
            out = block(out, *conditions)
        self.added = out - hidden
        return out


class BlockCache:
    """One walk's memory: every call in `call` is full, or uses again what the last full one kept.

    A call that uses it again runs 2 of the transformer's blocks. Without gradient only. Never data-dependent, so a
    latent does not depend on its neighbours in the batch. Raises ValueError for a transformer without middle blocks.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        if len(transformer.blocks) < 3:
            raise ValueError(
                f"feature caching needs at least 3 blocks, the transformer has {len(transformer.blocks)}"
            )
        self.transformer = transformer
        first, *middle, last = transformer.blocks
        self.middle = Middle(middle)
        self.blocks = nn.ModuleList([first, self.middle, last])

    @contextmanager
    def call(self, *, again: bool) -> Iterator[None]:
        """Inside, the transformer runs with the memory."""
        whole, self.transformer.blocks = self.transformer.blocks, self.blocks
        self.middle.again = again
        try:
            yield
        finally:
            self.transformer.blocks = whole
