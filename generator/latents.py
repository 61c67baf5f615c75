"""Between uint8 video and the normalised latents that the transformer works on, through `AutoencoderKLWan` in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from common.memory import AdaptiveBatcher

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor


class LatentCodec:
    """normalised = (posterior mean - latents_mean) / latents_std, per channel; the numbers are in the VAE's config.

    spatial, temporal  compression factors, from the VAE's config and checked against its layers
    Raises ValueError when the config contradicts the layers.
    """

    def __init__(self, vae: AutoencoderKLWan, *, batch: int | None) -> None:
        self.vae = vae
        self.portions = AdaptiveBatcher(batch, what="videos in the VAE")
        config = vae.config
        self.spatial = int(config.scale_factor_spatial)
        self.temporal = int(config.scale_factor_temporal)
        # latent and stock pipeline sizes come from these two numbers, and their default (8, 4) is easily left in place
        spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        temporal = 2 ** sum(config.temperal_downsample)
        if (self.spatial, self.temporal) != (spatial, temporal):
            raise ValueError(
                f"VAE config says scale_factor_spatial={self.spatial}, scale_factor_temporal={self.temporal}, "
                f"but its layers compress by {spatial} and {temporal}"
            )

    def latent_shape(
        self, *, height: int, width: int, num_frames: int, patch: Sequence[int]
    ) -> tuple[int, ...]:
        """(C, F, H, W) of a video of this size. Raises ValueError, naming each wrong size and the nearest right one."""
        problems = []
        for name, size, multiple in (
            ("height", height, self.spatial * patch[1]),
            ("width", width, self.spatial * patch[2]),
        ):
            if size % multiple:
                near = max(multiple, round(size / multiple) * multiple)
                problems.append(
                    f"{name} must be a multiple of {multiple}, got {size}, try {near}"
                )
        if (num_frames - 1) % self.temporal:
            near = round((num_frames - 1) / self.temporal) * self.temporal + 1
            problems.append(
                f"num_frames must be 1 more than a multiple of {self.temporal}, got {num_frames}, try {near}"
            )
        frames = (num_frames - 1) // self.temporal + 1
        if not problems and frames % patch[0]:
            problems.append(
                f"num_frames={num_frames} gives {frames} latent frames, not a multiple of {patch[0]}"
            )
        if problems:
            raise ValueError(
                "GeneratorConfig does not fit this VAE: " + "; ".join(problems)
            )
        return (
            self.vae.config.z_dim,
            frames,
            height // self.spatial,
            width // self.spatial,
        )

    @torch.no_grad()
    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Normalised latents -> uint8 video (B, T, Y, X, 3) on the CPU, `batch` videos at a time, or as fit.

        The arithmetic and its order are `WanPipeline`'s, so the same latents give the same bytes.
        """
        mean = self._per_channel(self.vae.config.latents_mean, clean_BCFHW.device)
        std = self._per_channel(self.vae.config.latents_std, clean_BCFHW.device)

        def some(part_BCFHW: Tensor) -> Tensor:
            pixels = self.vae.decode(
                part_BCFHW / (1.0 / std) + mean, return_dict=False
            )[0]
            unit = (pixels * 0.5 + 0.5).clamp(0, 1)
            return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

        return self.portions.over(some, clean_BCFHW.float())

    @torch.no_grad()
    def encode(self, video_BTYXC: Tensor, *, device: torch.device) -> Tensor:
        """uint8 video (B, T, Y, X, 3) -> normalised latents (B, C, F, H, W) fp32: the posterior MEAN, no sampling.

        Raises ValueError when diffusers' encoder, which reads one frame and then four at a time, would drop frames.
        """
        if (
            video_BTYXC.dtype != torch.uint8
            or video_BTYXC.dim() != 5
            or video_BTYXC.shape[-1] != 3
        ):
            raise ValueError(
                f"encode takes uint8 (B, T, Y, X, 3), got {video_BTYXC.dtype} {tuple(video_BTYXC.shape)}"
            )
        frames = video_BTYXC.shape[1]
        if (frames - 1) % 4:
            raise ValueError(
                f"encode needs 4 n + 1 frames, or the last ones are dropped; got {frames}"
            )
        mean = self._per_channel(self.vae.config.latents_mean, device)
        std = self._per_channel(self.vae.config.latents_std, device)

        def some(part_BTYXC: Tensor) -> Tensor:
            pixels = (
                part_BTYXC.to(device, torch.float32).permute(0, 4, 1, 2, 3) / 127.5 - 1
            )
            return (self.vae.encode(pixels).latent_dist.mode() - mean) / std

        return self.portions.over(some, video_BTYXC)

    @staticmethod
    def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
        return torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
