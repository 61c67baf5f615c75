"""LoRA's two sides as files hold them, apart, put together again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def both_sides(found: Iterable[tuple[str, str, Tensor]], *, rank: int, source: Path) -> dict[str, dict[str, Tensor]]:
    """(name of a linear, "A" or "B", tensor) in any order -> {"A": (rank, in), "B": (out, rank)} of each linear.

    ValueError, naming ``source``, for no linear at all, a lone side, or another rank.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, side, tensor in found:
        sides.setdefault(name, {})[side] = tensor
    if not sides:
        raise ValueError(f"{source} is empty")
    for name, own in sides.items():
        if set(own) != {"A", "B"} or own["A"].shape[0] != rank or own["B"].shape[1] != rank:
            shapes = {side: tuple(tensor.shape) for side, tensor in own.items()}
            raise ValueError(f"{source}: {name} has {shapes}, r={rank} wants A (r, in) and B (out, r)")
    return sides
