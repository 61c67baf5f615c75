"""AnyFlow as a policy: prefix and tail are jumps of a flow map, and one step has a density.

    x_1 -- jumps --> x_k -- one stochastic step --> x_(k+1) -- jumps --> x_0

A group costs [k > 0] + 1 + G m forwards with one jump to x_k and m from there on, without
guidance, where a Wan takes (k + 1) + G (T - k - 1) guided steps. The stochastic step is that of
`generator.flow.Kernel`: "sde" and "cps" at the velocity u(x, t, t), or "anchor" at the mean
velocity of a jump, so that the jump itself is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from generator.family import Family
from generator.sampler import initial_noise, jumps
from generator.schedule import prefix_grid, sigma_grid
from generator.wan import WanGenerator
from generator.wan_folder import find_wan

if TYPE_CHECKING:
    from torch import Tensor

    from common.gaussian import Gaussian
    from common.types import Prompt, Step
    from generator.config import GeneratorConfig


class AnyFlowGenerator(WanGenerator):
    """A `WanGenerator` over a flow map; `velocity`, and so `flow_error`, is its diagonal."""

    flow_map = True

    def mean_velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        target_B: Tensor,
        prompts: Sequence[Prompt],
    ) -> Tensor:
        """u(x, sigma, target), one prompt per sample -> (B, C, F, H, W), fp32 or better.

        Raises RuntimeError where `velocity` does.
        """
        # There is no negative prompt.
        self._require_no_grad()
        conditions = self._conditions(list(prompts), guided=False)
        return self.denoiser.mean_velocity(x_BCFHW, sigma_B, target_B, conditions)

    def transition(self, prompt: Prompt, step: Step) -> Gaussian:
        """Distribution of `next` given the latent: mean (M, C, F, H, W), gradient through it.

        A latent that all members share costs one forward, separate latents cost G.
        """
        # All members are at the same noise level and have the same prompt.
        x_MCFHW = step.latent_MCFHW.to(self.device)
        sigma_M = torch.full((len(x_MCFHW),), step.sigma)
        # The second time is sigma itself, or the anchor.
        target = self.kernel.target(step.sigma, step.sigma_next)
        target_M = torch.full((len(x_MCFHW),), target)
        texts = [prompt] * len(x_MCFHW)
        u_MCFHW = self.mean_velocity(x_MCFHW, sigma_M, target_M, texts)
        return self.kernel.transition(x_MCFHW, u_MCFHW, step.sigma, step.sigma_next)

    @torch.no_grad()
    def map_gap(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> float:
        """How far a jump is from two: |J(1 -> 0) - J(s -> 0) J(1 -> s)| / |J(1 -> 0)|, MEAN.

        s is in the middle of the grid of two jumps. A flow map has 0, and training a single step
        may take it apart. It costs three forwards a prompt.
        """
        grid = sigma_grid(2, shift=self.cfg.sampler.shift).tolist()
        gaps = []
        # The rank's batches may be smaller than others': no collective call is made.
        for prompt, seed in zip(prompts, seeds, strict=True):
            x_1CFHW = initial_noise(seed, self.latent_shape)[None].to(self.device)
            once = self._descend(x_1CFHW, [1.0, 0.0], [prompt])
            twice = self._descend(x_1CFHW, grid, [prompt])
            gaps.append(float((once - twice).norm() / once.norm()))
        return sum(gaps) / len(gaps)

    # ---- parts of a rollout ----

    def _guided_velocity(
        self, *prompts: Prompt, scale: float | None = None
    ) -> Callable[[Tensor, float], Tensor]:
        """What the kernel takes at a stochastic step, as a function of (x, sigma)."""
        # A step of the grid is known by where it begins.
        cfg = self.cfg.sampler
        grid = sigma_grid(cfg.num_steps, shift=cfg.shift).tolist()
        after = dict(pairwise(grid))
        mean_velocity = self._mean_velocity(prompts)

        def velocity(x_BCFHW: Tensor, sigma: float) -> Tensor:
            target = self.kernel.target(sigma, after[sigma])
            return mean_velocity(x_BCFHW, sigma, target)

        return velocity

    def _mean_velocity(
        self, prompts: Sequence[Prompt]
    ) -> Callable[[Tensor, float, float], Tensor]:
        """u as a function of (x, sigma, target); a single prompt serves every sample."""

        def mean_velocity(x_BCFHW: Tensor, sigma: float, target: float) -> Tensor:
            size = len(x_BCFHW)
            texts = prompts if len(prompts) > 1 else [*prompts] * size
            sigma_B = torch.full((size,), sigma)
            target_B = torch.full((size,), target)
            return self.mean_velocity(x_BCFHW, sigma_B, target_B, texts)

        return mean_velocity

    def _descend(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompts: Sequence[Prompt],
    ) -> Tensor:
        return jumps(self._mean_velocity(prompts), x_BCFHW, sigmas)

    def _prefix(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompt: Prompt,
    ) -> Tensor:
        """Jump to the first stochastic step."""
        # One grid for the prefix, however many steps the training grid has there.
        cfg = self.cfg.sampler
        if cfg.prefix_steps is not None and cfg.prefix_steps < len(sigmas) - 1:
            grid = prefix_grid(sigmas[-1], cfg.prefix_steps, shift=cfg.shift)
            sigmas = grid.tolist()
        return super()._prefix(x_BCFHW, sigmas, prompt)

    def _tail(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompt: Prompt,
    ) -> Tensor:
        """Jump to sigma = 0."""
        cfg = self.cfg.sampler
        with self._fast(cfg.tail_attention or cfg.attention):
            return self._descend(x_BCFHW, self._tail_sigmas(sigmas), [prompt])

    def _stock(
        self,
        x_BCFHW: Tensor,
        prompts: Sequence[Prompt],
        num_steps: int,
    ) -> Tensor:
        """Sample with the stock AnyFlowPipeline, which has no guidance to give."""
        # The pipeline gets the policy, or the reference.
        self._pipeline.transformer = self.denoiser.expert.transformer
        return self._pipeline(
            prompt_embeds=self._conditions(prompts, guided=False).text_BLD,
            height=self.cfg.height,
            width=self.cfg.width,
            num_frames=self.cfg.num_frames,
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            latents=x_BCFHW,
            output_type="latent",
        ).frames.float()


def class_for(family: Family) -> type[WanGenerator]:
    """The generator of a family."""
    return AnyFlowGenerator if family.flow_map else WanGenerator


def load_generator(cfg: GeneratorConfig, **options: Any) -> WanGenerator:
    """Load the generator that the JSON files of cfg.path ask for, see `WanGenerator.load`."""
    family = Family.of(find_wan(cfg.path))
    return class_for(family).load(cfg, **options)
