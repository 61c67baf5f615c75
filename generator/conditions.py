"""What a video is conditioned on besides its text: the image that it begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.types import ImagePrompt, Prompt
from generator.given import given_entries

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from generator.config import GeneratorConfig
    from generator.family import Family
    from generator.latents import LatentCodec


@dataclass(frozen=True)
class ImageCondition:
    """An image as a transformer is told of it, on the CPU.

    latent_CFHW  fp32, normalised: of the image followed by grey frames, or of the image alone
    tokens_LD    of CLIP's last hidden state but one; None for families without CLIP
    """

    latent_CFHW: Tensor
    tokens_LD: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, as files hold them."""
        if self.tokens_LD is None:
            return {"latent": self.latent_CFHW}
        return {"latent": self.latent_CFHW, "tokens": self.tokens_LD}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ImageCondition:
        """Read what `tensors` returned."""
        return cls(tensors["latent"], tensors.get("tokens"))


def check_image_prompts(prompts: Iterable[Prompt], family: Family, source: str) -> None:
    """Raise ValueError for a prompt without a needed image, or with one for a text model."""
    # The first prompt that does not fit is named.
    for prompt in prompts:
        has_image = isinstance(prompt, ImagePrompt)
        if family.needs_image and not has_image:
            raise ValueError(
                f"{source} makes videos of images, and this prompt has none: {prompt!r:.80}; "
                'prompts with images are lines {"prompt": ..., "image": FILE} of a .jsonl file'
            )
        if family.image == "none" and has_image:
            raise ValueError(
                f"{source} makes videos of texts alone, but a prompt has an image: {prompt!r:.80}"
            )


def check_pairs(
    prompts: Sequence[Prompt],
    condition: ImageCondition | None,
    family: Family,
    source: str,
) -> None:
    """Raise ValueError for stored pairs that another kind of model has made.

    prompts    of the pairs
    condition  that of the first prompt's image, None without one
    """
    check_image_prompts(prompts, family, source)
    check_alike(prompts)
    if condition is None:
        return
    # A latent of one frame is the image's own; others go into channels, with grey frames.
    is_first_frame = condition.latent_CFHW.shape[1] == 1
    has_tokens = condition.tokens_LD is not None
    fits = is_first_frame == (family.image == "first_frame")
    if not fits or has_tokens != (family.image == "channels+clip"):
        raise ValueError(
            f"the images of these pairs were encoded for another kind of model than {source}: "
            "make the pairs again with launch/pairs.py and this model"
        )


def check_alike(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError where some prompts have an image and others have none."""
    bare = [prompt for prompt in prompts if not isinstance(prompt, ImagePrompt)]
    if bare and len(bare) < len(prompts):
        raise ValueError(
            f"a set of pairs has images for all prompts or for none, and {len(bare)} of "
            f"{len(prompts)} prompts have none, such as {bare[0]!r:.80}: make two sets"
        )


def read_image(path: str) -> Image:
    """Read an image file as RGB; ValueError names a file that is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise ValueError(f"{path}: no image that can be read: {error}") from error


class ImageCache:
    """Maps an image file to its condition, for the length of a run.

    The image is resized to the video's height and width, not cropped, as the stock pipeline does.
    Each image is encoded alone: a condition must not depend on its neighbours.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        codec: LatentCodec | None,
        cfg: GeneratorConfig,
        device: torch.device,
    ) -> None:
        self._pipeline = pipeline
        self._family = family
        self._codec = codec
        self._cfg = cfg
        self._device = device
        self._conditions: dict[str, ImageCondition] = {}

    @torch.no_grad()
    def get(self, path: str) -> ImageCondition:
        """Return an image's condition; encodes it when it is new.

        Raises ValueError for a file that is no image, RuntimeError for a new image after CLIP has
        been freed, or without a VAE.
        """
        if path not in self._conditions:
            if self._codec is None:
                raise RuntimeError(
                    f"{path} is not among the stored images, and this generator was loaded "
                    "without its VAE"
                )
            image = read_image(path)
            self._conditions[path] = ImageCondition(
                self._latent(image), self._tokens(image)
            )
        return self._conditions[path]

    def give(self, path: str, condition: ImageCondition) -> None:
        """Use this condition for an image, whose file is then not read."""
        self._conditions[path] = condition

    def given(
        self, conditions: Mapping[str, ImageCondition]
    ) -> AbstractContextManager[None]:
        """Inside, these conditions are in the cache, unless it had its own."""
        return given_entries(self._conditions, conditions)

    def free_encoder(self) -> None:
        """Free CLIP; images that are known still work."""
        if self._family.image == "channels+clip":
            self._pipeline.image_encoder = None

    def _latent(self, image: Image) -> Tensor:
        from diffusers.video_processor import VideoProcessor

        # The stock pipeline's own resizing.
        processor = VideoProcessor(vae_scale_factor=self._codec.spatial)
        pixels_1CYX = processor.preprocess(
            image, height=self._cfg.height, width=self._cfg.width
        )
        # A video of a single frame.
        video_1CTYX = pixels_1CYX.unsqueeze(2).to(self._device, torch.float32)
        # zeros in pixels are grey, and not zero in the latent
        if self._family.needs_image:
            grey = video_1CTYX.new_zeros(
                1, 3, self._cfg.num_frames - 1, *video_1CTYX.shape[3:]
            )
            video_1CTYX = torch.cat([video_1CTYX, grey], dim=2)
        return self._codec.encode_pixels(video_1CTYX)[0].cpu()

    def _tokens(self, image: Image) -> Tensor | None:
        if self._family.image != "channels+clip":
            return None
        if self._pipeline.image_encoder is None:
            raise RuntimeError("the image encoder has been freed before a new image")
        # of the image itself, which its own processor resizes
        tokens_1LD = self._pipeline.encode_image(image, self._device)
        return tokens_1LD[0].cpu()


def stacked(
    conditions: Sequence[ImageCondition], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, C, F, H, W) in fp32 and tokens (B, L, D) in ``dtype``, if there are any."""
    latents = [condition.latent_CFHW for condition in conditions]
    latent_BCFHW = torch.stack(latents).to(device)
    # All conditions are of one family: all have tokens, or none.
    tokens = [c.tokens_LD for c in conditions if c.tokens_LD is not None]
    if not tokens:
        return latent_BCFHW, None
    return latent_BCFHW, torch.stack(tokens).to(device, dtype)
