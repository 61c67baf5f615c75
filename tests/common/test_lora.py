"""Pairing the A and B matrices of a LoRA file, and each way in which they may not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.lora import LoraScales, low_ranks

# rank 2, from 5 to 3
A, B = torch.zeros(2, 5), torch.zeros(3, 2)


def named(*entries: tuple[str, str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_{side}.weight": tensor for name, side, tensor in entries}


def test_low_ranks_pairs_matrices_in_any_order() -> None:
    tensors = named(("x", "A", A), ("y", "B", B), ("y", "A", A), ("x", "B", B))
    pairs = low_ranks(tensors, LoraScales(2, 3.0), source=Path("f"))
    assert list(pairs) == ["x.weight", "y.weight"]
    assert pairs["x.weight"].a_RI is pairs["y.weight"].a_RI is A
    assert pairs["x.weight"].b_OR is B
    assert pairs["x.weight"].scaling == 1.5
    assert pairs["x.weight"].shape == (3, 5)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "empty"),
        ([("x", "A", A)], r"x\.weight"),
        ([("x", "A", A), ("x", "B", B), ("y", "B", B)], r"\by\b"),
        (
            [("x", "A", torch.zeros(4, 5)), ("x", "B", B)],
            r"\(4, 5\)",
        ),
        (
            [("x", "A", A), ("x", "B", torch.zeros(3, 4))],
            r"\(3, 4\)",
        ),
        ([("x", "A", torch.zeros(2))], r"x\.lora_A"),
        ([("x", "C", A)], r"x\.lora_C"),
    ],
)
def test_low_ranks_names_what_does_not_fit(entries: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        low_ranks(named(*entries), LoraScales(2, 2.0), source=Path("f"))
