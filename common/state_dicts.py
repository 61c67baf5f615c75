"""Compare the names and shapes of two state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def shapes_in(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    shapes = {}
    for name, tensor in state.items():
        shapes[name] = tuple(tensor.shape)
    return shapes


def state_dict_problems(
    stored: Shapes,
    wanted: Shapes,
) -> list[str]:
    """List the differences of two state dicts: names first, then shapes."""
    # Names.
    problems = []
    for name in sorted(stored.keys() - wanted.keys()):
        problems.append(f"unexpected {name}")
    for name in sorted(wanted.keys() - stored.keys()):
        problems.append(f"missing {name}")

    # Shapes.
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name] != wanted[name]:
            problems.append(f"{name} is {stored[name]}, want {wanted[name]}")
    return problems


def raise_problems(problems: list[str], sentence: str) -> None:
    """Raise ValueError with the sentence and the first ten problems, if there are any."""
    if not problems:
        return
    # Many problems usually have the same cause.
    count = len(problems)
    shown = "; ".join(problems[:10])
    raise ValueError(f"{sentence} ({count} problems): {shown}")
