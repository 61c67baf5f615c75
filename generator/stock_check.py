"""Compare our ODE sampler with diffusers' WanPipeline, on the same grid and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from generator.schedule import sigma_grid

if TYPE_CHECKING:
    from generator.wan import WanGenerator


class OwnGrid(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on our `sigma_grid`; its grids differ between versions."""

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        sigmas = sigma_grid(num_inference_steps, shift=self.config.shift)
        # The scheduler's values, replaced by ours.
        self.sigmas = sigmas.float().to(device)
        # t = 1000 sigma, not an integer
        self.timesteps = 1000 * self.sigmas[:-1]


def stock_gap(generator: WanGenerator, prompt: str) -> float:
    """max |ours - stock| / max |stock| over the latents of one video, after two steps."""
    # 1. The stock pipeline, with our grid for the moment.
    pipeline = generator._pipeline
    scheduler = pipeline.scheduler
    # AnyFlow's own scheduler has our grid.
    own = FlowMapEulerDiscreteScheduler if generator.flow_map else OwnGrid
    pipeline.scheduler = own(shift=generator.cfg.sampler.shift)
    try:
        stock = generator.sample(
            [prompt],
            [0],
            num_steps=2,
            scheduler="pipeline",
        )
    finally:
        pipeline.scheduler = scheduler

    # 2. Our sampler.
    ours = generator.sample([prompt], [0], num_steps=2)
    return float((ours - stock).abs().max() / stock.abs().max())
