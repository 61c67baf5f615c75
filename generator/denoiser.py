"""The denoiser of a Wan: v at (x, sigma, conditions), with guidance, in fp32.

It knows how the transformer is called, and nothing of walks, prompts or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common import progress
from common.gaussian import widen
from generator.flow import guide

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor, nn


@dataclass(frozen=True)
class Expert:
    """A transformer.

    module       what is called: the transformer in peft's wrapper, or bare
    transformer  the stock module inside
    """

    module: nn.Module
    transformer: WanTransformer3DModel

    @property
    def dtype(self) -> torch.dtype:
        """Of its large weights, in which it computes; norms may be fp32."""
        return self.transformer.patch_embedding.weight.dtype


@dataclass(frozen=True)
class Conditions:
    """What each latent of a batch is conditioned on.

    text_BLD      embeddings of the prompts, padded to their full length
    negative_BLD  embeddings of the negative prompts; None without guidance
    """

    text_BLD: Tensor
    negative_BLD: Tensor | None = None


class Denoiser:
    """Calls the transformer as the stock pipeline does, for B latents in one forward."""

    def __init__(self, expert: Expert, device: torch.device) -> None:
        self.expert = expert
        self.device = device

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
        """
        # 1. Both branches of the guidance.
        guided = guidance_scale != 1
        text_BLD = conditions.text_BLD
        if guided:
            text_BLD = torch.cat([text_BLD, conditions.negative_BLD])
            x_BCFHW = torch.cat([x_BCFHW, x_BCFHW])
            sigma_B = torch.cat([sigma_B, sigma_B])

        # 2. One forward of the transformer.
        module = self.expert.module
        # the check is free; eval() on every submodule was a tenth of a tiny model's forward
        if module.training:
            module.eval()
        out = module(
            hidden_states=x_BCFHW.to(self.device, self.expert.dtype),
            # not an integer, rounded as diffusers' Euler scheduler rounds it
            timestep=1000 * sigma_B.to(self.device, torch.float32),
            encoder_hidden_states=text_BLD,
            return_dict=False,
        )[0]

        # 3. Guidance in fp32.
        progress.tick()
        v = widen(out)
        return guide(*v.chunk(2), guidance_scale) if guided else v
