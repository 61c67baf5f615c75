"""A and B of a LoRA, put together: what fits, and each thing that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.lora import both_sides

A, B = torch.zeros(2, 5), torch.zeros(3, 2)  # rank 2, from 5 to 3


def test_sides_find_each_other_in_any_order() -> None:
    found = both_sides(
        [("x", "A", A), ("y", "B", B), ("y", "A", A), ("x", "B", B)],
        rank=2,
        source=Path("f"),
    )
    assert {name: list(own) for name, own in found.items()} == {
        "x": ["A", "B"],
        "y": ["B", "A"],
    }
    assert found["x"]["A"] is found["y"]["A"] is A


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "f is empty"),
        (
            [("x", "A", A)],
            r"f: x has \{'A': \(2, 5\)\}, r=2 wants A \(r, in\) and B \(out, r\)",
        ),
        ([("x", "A", A), ("x", "B", B), ("y", "B", B)], "f: y has"),
        (
            [("x", "A", torch.zeros(4, 5)), ("x", "B", B)],
            r"f: x has \{'A': \(4, 5\), 'B': \(3, 2\)\}",
        ),
        (
            [("x", "A", A), ("x", "B", torch.zeros(3, 4))],
            r"f: x has \{'A': \(2, 5\), 'B': \(3, 4\)\}",
        ),
    ],
)
def test_what_is_no_adapter_is_named(found: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        both_sides(found, rank=2, source=Path("f"))
