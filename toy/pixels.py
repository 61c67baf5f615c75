"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(video_BTYXC: Tensor) -> Tensor:
    """uint8 (B, T, Y, X, 3) -> float (B, 3, T, Y, X) in [-1, 1], what the VAE reads."""
    return video_BTYXC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_bytes(unit: Tensor) -> Tensor:
    """The inverse of `to_unit`, rounded."""
    return (
        ((unit + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 4, 1)
    )
