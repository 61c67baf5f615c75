"""A small decoder for the frames that rewards see: diffusers' `AutoencoderTiny`, frame by frame.

    x_f = [z_f, z_(f-1), ..., z_(f-w+1)] / scaling_factor + shift_factor
    frames s (f-1) + 1 .. s f of the video = decoder(x_f)          f = 0 gives its last frame only

z are normalised latents, those of the transformer, and s is the VAE's temporal factor. The class is
of images: s frames are 3 s channels of its output (``out_channels``), and w latent frames beside
each other are its input (``latent_channels``), with the first repeated where there is none before.
`AutoencoderKLWan` takes latents times std plus mean; a decoder of this class takes them
as they are, since it cuts them off by 3 tanh(x / 3). scaling_factor and shift_factor of the
folder's config.json are applied as diffusers' pipelines apply them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderTiny

from common import progress
from common.files import read_json
from common.memory import AdaptiveBatcher
from common.strict_loading import load_pretrained
from generator.latents import store_channels_last, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from generator.config import GeneratorConfig
    from generator.latents import LatentCodec

KEY = "generator.scoring_decoder"
# Bytes are red, green and blue.
COLOURS = 3
# Statistics of every channel, which only `AutoencoderKLWan` reads.
_OF_THE_VAE = ("latents_mean", "latents_std")


class ScoringDecoder:
    """Normalised latents -> uint8 video of the VAE's size, by a few 2-D convolutions.

    Raises ValueError, in one sentence that names ``source``, where the model would not give the
    VAE's frames, height and width.
    """

    def __init__(
        self,
        model: AutoencoderTiny,
        codec: LatentCodec,
        *,
        source: str | Path,
        batch: int | None,
    ) -> None:
        check_fits(model, codec, source)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.temporal = codec.temporal
        self.window = model.config.latent_channels // codec.vae.config.z_dim
        self.portions = AdaptiveBatcher(batch, what="videos in the scoring decoder")

    @classmethod
    def load(
        cls, cfg: GeneratorConfig, codec: LatentCodec, device: torch.device
    ) -> ScoringDecoder:
        """Read cfg.scoring_decoder, every weight of it, in the VAE's dtype.

        Raises ValueError or FileNotFoundError, naming the folder and the tensor or the key, for
        what `load_pretrained` refuses, another video shape, and another scaling of latents.
        """
        folder = Path(cfg.scoring_decoder)
        check_scaling(folder)
        model = load_pretrained(
            AutoencoderTiny,
            folder,
            dtype=getattr(torch, cfg.vae_dtype),
            device=device,
        )
        if cfg.vae_channels_last:
            store_channels_last(model)
        return cls(model, codec, source=folder, batch=cfg.decode_batch)

    @torch.no_grad()
    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Normalised latents (B, C, F, H, W) -> uint8 (B, s (F - 1) + 1, Y, X, 3) on the CPU."""

        def decode_part(part_BCFHW: Tensor) -> Tensor:
            pixels_BCTYX = self.pixels(part_BCFHW)
            progress.tick()
            return to_bytes(pixels_BCTYX)

        return self.portions.over(decode_part, clean_BCFHW.float())

    def pixels(self, clean_BCFHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, Y, X), in -1..1 but for overshoots, fp32; with gradient if enabled."""
        # 1. Every latent frame with those before it, as images.
        config = self.model.config
        beside_BCFHW = with_frames_before(clean_BCFHW, self.window)
        images = beside_BCFHW.transpose(1, 2).flatten(0, 1)
        images = images / config.scaling_factor + config.shift_factor

        # 2. Each image gives the frames of its latent frame.
        decoded = self.model.decode(images.to(self.model.dtype), return_dict=False)[0]
        video = decoded.float().unflatten(1, (self.temporal, COLOURS))
        video = video.unflatten(0, (len(clean_BCFHW), -1)).flatten(1, 2)

        # 3. The first latent frame stands for one frame.
        video_BTCYX = video[:, self.temporal - 1 :]
        return video_BTCYX.transpose(1, 2)


def with_frames_before(x_BCFHW: Tensor, window: int) -> Tensor:
    """Every frame beside the ``window`` - 1 before it, along the channels: (B, w C, F, H, W).

    Before the first frame is the first.
    """
    frames = x_BCFHW.shape[2]
    shifted = [x_BCFHW]
    for back in range(1, window):
        places = torch.arange(frames, device=x_BCFHW.device) - back
        shifted.append(x_BCFHW[:, :, places.clamp(min=0)])
    return torch.cat(shifted, dim=1)


def check_scaling(folder: Path) -> None:
    """Raise ValueError where config.json scales latents as a class of other latents does.

    The class reads one number of each kind, and passes over what it does not know.
    """
    file = folder / "config.json"
    # a folder without it is refused by who reads the weights
    config = read_json(file) if file.is_file() else {}
    for key in _OF_THE_VAE:
        if config.get(key) is not None:
            raise ValueError(
                f"{file} has {key}, which is of the VAE and is not applied: a scoring decoder "
                "takes normalised latents; leave the key out, or train it on those"
            )
    for key in ("scaling_factor", "shift_factor"):
        value = config.get(key, 1.0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (key == "scaling_factor" and value <= 0):
            raise ValueError(f"{file} has {key}={value!r}, want a number to scale by")


def check_fits(model: AutoencoderTiny, codec: LatentCodec, source: str | Path) -> None:
    """Raise ValueError unless a decoder makes the same video shape as the VAE."""
    # One upsampling after each stage but the last.
    config = model.config
    stages = len(config.num_decoder_blocks)
    spatial = config.upsampling_scaling_factor ** (stages - 1)
    channels = codec.vae.config.z_dim
    wanted = COLOURS * codec.temporal
    problem = None
    if config.out_channels != wanted:
        problem = (
            f"out_channels={config.out_channels}, and {codec.temporal} frames of 3 colours "
            f"for each latent frame (Wan: 4 n + 1 frames of n + 1) are {wanted}"
        )
    elif spatial != codec.spatial:
        problem = (
            f"{stages} stages that enlarge by {spatial}, and the VAE enlarges by "
            f"{codec.spatial}"
        )
    elif config.latent_channels % channels:
        problem = (
            f"latent_channels={config.latent_channels}, and latents have {channels}: it must be "
            "a multiple, for a latent frame and those before it"
        )
    if problem is not None:
        raise ValueError(f"{KEY}={source} has {problem}")
