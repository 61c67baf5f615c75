"""Is our noiseless walk the stock pipeline's? The same grid, the same noise, diffusers' own loop and scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from generator.schedule import sigma_grid

if TYPE_CHECKING:
    from generator.wan import WanGenerator


class OwnGrid(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on `generator.schedule.sigma_grid`; its own grids differ between versions."""

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        self.sigmas = (
            sigma_grid(num_inference_steps, shift=self.config.shift).float().to(device)
        )
        self.timesteps = 1000 * self.sigmas[:-1]


def stock_gap(
    generator: WanGenerator, prompt: str, *, seed: int = 0, num_steps: int = 2
) -> float:
    """max |ours - stock| / max |stock| over one video's latents, after ``num_steps`` steps. No grad, no decoding."""
    pipeline = generator._pipeline
    plain, pipeline.scheduler = (
        pipeline.scheduler,
        OwnGrid(shift=generator.cfg.sampler.shift),
    )
    try:
        stock = generator.sample(
            [prompt], [seed], num_steps=num_steps, scheduler="pipeline"
        )
    finally:
        pipeline.scheduler = plain
    ours = generator.sample([prompt], [seed], num_steps=num_steps)
    return float((ours - stock).abs().max() / stock.abs().max())
