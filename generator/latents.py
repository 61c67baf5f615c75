"""LatentCodec: uint8 video <-> normalised latents, through `AutoencoderKLWan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from common import progress
from common.memory import AdaptiveBatcher
from common.strict_loading import is_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor, nn


def store_channels_last(vae: nn.Module) -> None:
    """Store a VAE's kernels with channels last. No weight changes, but sums may run otherwise."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        # biases and norms of other shapes have no such layout
        layout = layouts.get(parameter.dim())
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def to_bytes(pixels_BCTYX: Tensor) -> Tensor:
    """Pixels in -1..1 -> uint8 (B, T, Y, X, C) on the CPU."""
    unit = (pixels_BCTYX * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


class LatentCodec:
    """Encodes and decodes video, a few videos per VAE call.

        normalised = (posterior mean - latents_mean) / latents_std        per channel

    latents_mean and latents_std come from the VAE's config, as do the compression factors
    ``spatial`` and ``temporal``, which are checked against its layers. Raises ValueError when the
    config contradicts the layers.
    """

    def __init__(self, vae: AutoencoderKLWan, *, batch: int | None) -> None:
        # Sizes as the config gives them.
        self.vae = vae
        self.portions = AdaptiveBatcher(batch, what="videos in the VAE")
        config = vae.config
        self.spatial = int(config.scale_factor_spatial)
        self.temporal = int(config.scale_factor_temporal)
        # both sizes follow from these numbers, and their default (8, 4) is easily left in place
        spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        temporal = 2 ** sum(config.temperal_downsample)
        if (self.spatial, self.temporal) != (spatial, temporal):
            raise ValueError(
                f"VAE config says scale_factor_spatial={self.spatial}, "
                f"scale_factor_temporal={self.temporal}, "
                f"but its layers compress by {spatial} and {temporal}"
            )

    def latent_shape(
        self,
        *,
        height: int,
        width: int,
        num_frames: int,
        patch: Sequence[int],
    ) -> tuple[int, ...]:
        """(C, F, H, W) of a video of this size.

        Raises ValueError that names each wrong size and the nearest right value.
        """
        # Height and width: whole patches of the transformer. The first frame is encoded alone.
        problems = []
        for name, size, multiple, alone in (
            ("height", height, self.spatial * patch[1], 0),
            ("width", width, self.spatial * patch[2], 0),
            ("num_frames", num_frames, self.temporal, 1),
        ):
            if (size - alone) % multiple:
                near = max(1, round((size - alone) / multiple)) * multiple + alone
                more = f"{alone} more than " if alone else ""
                problems.append(
                    f"{name} must be {more}a multiple of {multiple}, got {size}, try {near}"
                )
        frames = (num_frames - 1) // self.temporal + 1
        if not problems and frames % patch[0]:
            problems.append(
                f"num_frames={num_frames} gives {frames} latent frames, "
                f"not a multiple of {patch[0]}"
            )
        if problems:
            raise ValueError(
                "GeneratorConfig does not fit this VAE: " + "; ".join(problems)
            )
        # Sizes that fit.
        channels = self.vae.config.z_dim
        return channels, frames, height // self.spatial, width // self.spatial

    @torch.no_grad()
    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Normalised latents -> uint8 video (B, T, Y, X, 3) on the CPU.

        The arithmetic and its order are `WanPipeline`'s, so the same latents give the same bytes
        if the VAE is fp32. Latents and pixels are fp32 around a VAE of another dtype.
        """
        mean, std = self._mean_and_std(clean_BCFHW.device)

        def decode_part(part_BCFHW: Tensor) -> Tensor:
            latents = part_BCFHW / (1.0 / std) + mean
            pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
            progress.tick()
            return to_bytes(pixels.float())

        return self.portions.over(decode_part, clean_BCFHW.float())

    @torch.no_grad()
    def encode(self, video_BTYXC: Tensor, *, device: torch.device) -> Tensor:
        """uint8 video (B, T, Y, X, 3) -> normalised latents (B, C, F, H, W) fp32.

        Takes the posterior MEAN, without sampling. Raises ValueError for another dtype or shape,
        and when diffusers' encoder, which reads one frame and then four at a time, would drop
        frames.
        """
        # Checks.
        shape = tuple(video_BTYXC.shape)
        if video_BTYXC.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3:
            raise ValueError(
                f"encode takes uint8 (B, T, Y, X, 3), got {video_BTYXC.dtype} {shape}"
            )
        if (shape[1] - 1) % 4:
            raise ValueError(
                f"encode needs 4 n + 1 frames, or the last frames are dropped; got {shape[1]}"
            )

        def encode_part(part_BTYXC: Tensor) -> Tensor:
            video = part_BTYXC.to(device, torch.float32).permute(0, 4, 1, 2, 3)
            # bytes to -1..1
            return self.encode_pixels(video / 127.5 - 1)

        return self.portions.over(encode_part, video_BTYXC)

    @torch.no_grad()
    def encode_pixels(self, video_BCTYX: Tensor) -> Tensor:
        """Pixels in -1..1 -> normalised latents (B, C, F, H, W) fp32, all videos together."""
        mean, std = self._mean_and_std(video_BCTYX.device)
        pixels = video_BCTYX.to(self.vae.dtype)
        return (self.vae.encode(pixels).latent_dist.mode().float() - mean) / std

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(mean, std) per channel, shaped (1, C, 1, 1, 1)."""
        # A number per latent channel, broadcast over frames and pixels.
        mean = torch.tensor(self.vae.config.latents_mean, device=device)
        std = torch.tensor(self.vae.config.latents_std, device=device)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def require_finite_latents(
    clean_BCFHW: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Raise ValueError, naming prompt and seed, unless all latents are finite.

    NaN would decode to a video like any other.
    """
    for clean_CFHW, prompt, seed in zip(clean_BCFHW, prompts, seeds, strict=True):
        if not is_finite(clean_CFHW):
            raise ValueError(
                f"the latents of {prompt!r} with seed {seed} hold NaN or infinity, so there is no "
                "video of them; check the adapter and generator.dtype"
            )
