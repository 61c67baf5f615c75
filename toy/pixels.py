"""Convert between uint8 videos and the floats of the VAE."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(video_BTYXC: Tensor) -> Tensor:
    """Convert uint8 (B, T, Y, X, 3) to float (B, 3, T, Y, X) in [-1, 1]."""
    # The VAE wants channels first.
    video = video_BTYXC.permute(0, 4, 1, 2, 3)
    return video.float() / 127.5 - 1


def to_bytes(unit: Tensor) -> Tensor:
    """Invert `to_unit`, with rounding."""
    pixels = (unit + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1)
