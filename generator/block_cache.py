"""Feature caching: reuse what the middle blocks of a transformer added at an earlier step.

The difference that these blocks make changes little between neighbouring steps of a walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor


class Middle(nn.Module):
    """All blocks but the first and the last, as a single block.

    ``added`` is the change they made to their input at the last full call. With ``again`` the
    blocks are skipped and that change is added: h + added instead of blocks(h).
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.added: Tensor | None = None
        self.again = False

    def forward(self, hidden: Tensor, *conditions: Any) -> Tensor:
        # 1. Reuse the latest change.
        if self.again and self.added is not None:
            return hidden + self.added

        # 2. Compute it.
        out = hidden
        for block in self.blocks:
            out = block(out, *conditions)
        self.added = out - hidden
        return out


class BlockCache:
    """Feature cache of one walk: a call runs all blocks, or reuses the last full call.

    A call that reuses it runs 2 of the transformer's blocks. For sampling only, without gradient.
    Which call is full never depends on the data, so a latent does not depend on its neighbours in
    the batch. Raises ValueError for a transformer without middle blocks.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        number = len(transformer.blocks)
        if number < 3:
            raise ValueError(f"feature caching needs at least 3 blocks, got {number}")
        self.transformer = transformer
        # The outer blocks always run.
        first, *middle, last = transformer.blocks
        self.middle = Middle(middle)
        self.blocks = nn.ModuleList([first, self.middle, last])

    @contextmanager
    def call(self, *, again: bool) -> Iterator[None]:
        """Inside, the transformer runs with the cache; ``again`` skips its middle blocks."""
        # the first and last block stay, those between are replaced
        all_blocks = self.transformer.blocks
        self.transformer.blocks = self.blocks
        self.middle.again = again
        try:
            yield
        finally:
            self.transformer.blocks = all_blocks

    def wrap(
        self, velocity: Callable[[Tensor, float], Tensor], *, every: int
    ) -> Callable[[Tensor, float], Tensor]:
        """Make every ``every``-th call of ``velocity`` full, and the calls between reuse it."""
        # Counted over the walk, not over its batches' data.
        calls = 0

        def cached(x_BCFHW: Tensor, sigma: float) -> Tensor:
            nonlocal calls
            again = calls % every > 0
            calls += 1
            with self.call(again=again):
                return velocity(x_BCFHW, sigma)

        return cached
