"""The denoiser of a Wan: v at (x, sigma, conditions), with guidance, in fp32.

It knows which transformer is called, and how, and nothing of walks, prompts or files. Wan 2.2 A14B
has two: one denoises from sigma = 1 down to a boundary, the other from there on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common import progress
from common.gaussian import widen
from generator.flow import guide

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor, nn

    from generator.offload import Waiting


@dataclass(frozen=True)
class Expert:
    """A transformer that denoises all of the way, or a part of it.

    module       what is called: the transformer in peft's wrapper, or bare
    transformer  the stock module inside
    waiting      where a frozen expert waits until it is called; None keeps it on the device
    """

    module: nn.Module
    transformer: WanTransformer3DModel
    waiting: Waiting | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of its large weights, in which it computes; norms may be fp32."""
        return self.transformer.patch_embedding.weight.dtype


@dataclass(frozen=True)
class Conditions:
    """What each latent of a batch is conditioned on.

    text_BLD      embeddings of the prompts, padded to their full length
    negative_BLD  embeddings of the negative prompts; None without guidance
    image_BCFHW   latents of the images; with x's frames they are told in channels, with a single
                  frame they are the first frame, and x has the others
    tokens_BLD    tokens of the images
    """

    text_BLD: Tensor
    negative_BLD: Tensor | None = None
    image_BCFHW: Tensor | None = None
    tokens_BLD: Tensor | None = None


class Denoiser:
    """Calls the transformer as the stock pipeline does, for B latents in one forward.

    experts   one, or two of which the first denoises where sigma is at least the boundary;
              None for an expert that is not loaded
    boundary  a sigma; None with a single expert
    trained   place of the expert that is trained
    first_frame  an image is the first frame of the latent, with a time of its own, instead of
                 channels beside x
    """

    def __init__(
        self,
        experts: Sequence[Expert | None],
        device: torch.device,
        *,
        boundary: float | None = None,
        trained: int = 0,
        first_frame: bool = False,
    ) -> None:
        self.experts = list(experts)
        self.device = device
        self.boundary = boundary
        self.trained = trained
        self.first_frame = first_frame

    @property
    def expert(self) -> Expert:
        """The expert that is trained."""
        return self.experts[self.trained]

    @property
    def loaded(self) -> list[Expert]:
        """All experts that are loaded."""
        return [expert for expert in self.experts if expert is not None]

    def place_at(self, sigma: float) -> int:
        """Place of the expert that denoises at sigma."""
        return place_at(sigma, self.boundary)

    def parts(self, sigmas: Sequence[float]) -> list[list[float]]:
        """Cut a descending walk into the parts of its experts; a part ends where the next begins.

        Step i is the expert's of sigma_i, where its velocity is taken.
        """
        cuts = [0]
        for i in range(1, len(sigmas) - 1):
            if self.place_at(sigmas[i]) != self.place_at(sigmas[i - 1]):
                cuts.append(i)
        ends = [*cuts[1:], len(sigmas) - 1]
        return [
            list(sigmas[start : end + 1]) for start, end in zip(cuts, ends, strict=True)
        ]

    def velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        conditions: Conditions,
        *,
        guidance_scale: float,
    ) -> Tensor:
        """v -> (B, C, F, H, W), fp32 (fp64 for fp64 weights).

            v = v_negative + scale (v_text - v_negative)

        The unconditional branch is the second half of one batch of 2 B; a scale of 1 leaves it out.
        Raises ValueError when the sigmas belong to two experts, RuntimeError for an expert that
        was not loaded.
        """
        # 1. The expert at these noise levels.
        expert = self._expert_of(sigma_B)

        # 2. Both branches of the guidance.
        guided = guidance_scale != 1
        if guided:
            conditions = _both_branches(conditions)
            x_BCFHW = torch.cat([x_BCFHW, x_BCFHW])
            sigma_B = torch.cat([sigma_B, sigma_B])

        # 3. What the transformer reads; 1000 sigma is not an integer, rounded as diffusers'
        # Euler scheduler rounds it.
        hidden = x_BCFHW.to(self.device, expert.dtype)
        time = 1000 * sigma_B.to(self.device, torch.float32)
        image_BCFHW = conditions.image_BCFHW
        if image_BCFHW is not None and self.first_frame:
            hidden = torch.cat([image_BCFHW.to(expert.dtype), hidden], dim=2)
            time = _time_per_token(time, hidden, expert.transformer.config.patch_size)
        elif image_BCFHW is not None:
            hidden = _beside(hidden, image_BCFHW, expert.transformer.config.in_channels)
        images = {}
        if conditions.tokens_BLD is not None:
            images["encoder_hidden_states_image"] = conditions.tokens_BLD

        # 4. One forward of the transformer.
        module = expert.module
        # the check is free; eval() on every submodule was a tenth of a tiny model's forward
        if module.training:
            module.eval()
        with _on_device(expert):
            out = module(
                hidden_states=hidden,
                timestep=time,
                encoder_hidden_states=conditions.text_BLD,
                return_dict=False,
                **images,
            )[0]
        if image_BCFHW is not None and self.first_frame:
            # the given frame does not move
            out = out[:, :, 1:]

        # 5. Guidance in fp32.
        progress.tick()
        v = widen(out)
        return guide(*v.chunk(2), guidance_scale) if guided else v

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, an expert that was fetched for a call stays on the device for the next."""
        waiting = [e.waiting for e in self.loaded if e.waiting is not None]
        if not waiting:
            yield
            return
        # at most one of two experts waits
        with waiting[0].kept():
            yield

    def _expert_of(self, sigma_B: Tensor) -> Expert:
        if self.boundary is None:
            return self.experts[0]
        places = {self.place_at(sigma) for sigma in sigma_B.tolist()}
        if len(places) > 1:
            raise ValueError(
                f"the boundary {self.boundary} between two transformers lies within the sigmas of "
                f"one batch, {float(sigma_B.min()):.4f} to {float(sigma_B.max()):.4f}"
            )
        (place,) = places
        return self.at(place)

    def at(self, place: int) -> Expert:
        """The expert at a place; RuntimeError if it was not loaded."""
        expert = self.experts[place]
        if expert is None:
            side = "below" if place else "not below"
            raise RuntimeError(
                f"the transformer for sigmas {side} {self.boundary} was not loaded"
            )
        return expert


def _both_branches(conditions: Conditions) -> Conditions:
    """The conditions of both halves of a batch: images are told to both."""

    def twice(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor])

    return Conditions(
        torch.cat([conditions.text_BLD, conditions.negative_BLD]),
        None,
        twice(conditions.image_BCFHW),
        twice(conditions.tokens_BLD),
    )


def _beside(x_BCFHW: Tensor, image_BCFHW: Tensor, channels: int) -> Tensor:
    """x, the mask of the given frame, and the image's latent, along the channels.

    The mask has a channel for each frame of a latent frame: 1 in the first latent frame, else 0.
    """
    images = x_BCFHW.shape[1] + image_BCFHW.shape[1]
    mask_BCFHW = x_BCFHW.new_zeros(len(x_BCFHW), channels - images, *x_BCFHW.shape[2:])
    mask_BCFHW[:, :, 0] = 1
    return torch.cat([x_BCFHW, mask_BCFHW, image_BCFHW.to(x_BCFHW.dtype)], dim=1)


def _time_per_token(
    time_B: Tensor, x_BCFHW: Tensor, patch: tuple[int, int, int]
) -> Tensor:
    """Time of each token (B, L), frame by frame: 0 in the first latent frame, which is given."""
    _, _, frames, height, width = x_BCFHW.shape
    tokens = (height // patch[1]) * (width // patch[2])
    time_BF = time_B[:, None].repeat(1, frames // patch[0])
    time_BF[:, 0] = 0
    return time_BF.repeat_interleave(tokens, dim=1)


def place_at(sigma: float, boundary: float | None) -> int:
    """Place of the expert at sigma: 0 for a single one or high noise, 1 for low noise.

    As the stock pipeline compares: fp32(1000 sigma) >= 1000 boundary. In fp64 the step of a grid
    that falls on the boundary would be on its other side: 0.875 at shift 3 and 20 steps.
    """
    if boundary is None:
        return 0
    time = 1000 * torch.tensor(sigma, dtype=torch.float32)
    return 0 if bool(time >= 1000 * boundary) else 1


@contextmanager
def _on_device(expert: Expert) -> Iterator[None]:
    """Inside, the weights of an expert are on the device."""
    if expert.waiting is None:
        yield
        return
    with expert.waiting.kept():
        expert.waiting.fetch()
        yield
