"""A generator of your own: what GRPO asks for, and what its command asks for besides.

    python launch/grpo.py --config configs/shapes/grpo_oracle.yaml run_dir=runs/examples/own \\
        generator.target=examples/own_generator.py:TintGenerator generator.path=none \\
        rewards.oracle=null rewards.warm.target=examples/my_reward.py:score steps=3 evaluation=null

It is a linear map of three colour channels, small enough to read. A latent is a tiny RGB video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.gaussian import Gaussian
from common.memory import AdaptiveBatcher
from common.types import Group, Step
from generator.flow import Kernel
from generator.sampler import Members, Walk, initial_noise, ode, rollout_group
from generator.schedule import sigma_grid

KERNEL = Kernel("sde", noise_level=1.0, max_std=0.45)
SIGMAS = sigma_grid(8, shift=3.0).tolist()
SHAPE = (3, 4, 8, 8)  # channels, frames, rows, columns of a latent
FILE = "tint.safetensors"


class TintGenerator:
    """Grey noise, and a trained tint W x + b of its velocity that is 0 at first."""

    def __init__(self, cfg: Any = None, *, seed: int = 0) -> None:
        """``cfg`` is the run's GeneratorConfig; this generator reads nothing from it."""
        self.cfg = cfg
        self.module = nn.Conv3d(3, 3, kernel_size=1)
        for weight in self.module.parameters():
            nn.init.zeros_(weight)
        self.is_reference = False

    # ---- for the loop of GRPO: module, rollout, transition, decode, reference ----

    def rollout(
        self,
        prompts: Sequence[str],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        """Sample a group for every prompt; one of its first three steps is stochastic."""
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            walk = Walk(
                shape=SHAPE,
                sigmas=SIGMAS,
                steps=[seed % 3],
                kernel=KERNEL,
                tail=self.denoise,
            )
            # prefix and stochastic step by the velocity, then the tail
            group = rollout_group(
                self.velocity,
                Members(prompt, seed, group_size, first_member),
                walk,
                batch=AdaptiveBatcher(None, what="latents"),
            )
            groups.append(group)
        return groups

    def transition(self, prompt: str, step: Step) -> Gaussian:
        """Return the Gaussian that a stochastic step draws from, in a forward with gradient."""
        x_BCFHW = step.latent_MCFHW
        v_BCFHW = self.velocity(x_BCFHW, step.sigma)
        return KERNEL.transition(x_BCFHW, v_BCFHW, step.sigma, step.sigma_next)

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Make uint8 videos (B, T, Y, X, 3): a latent of -1 is black, of 1 full colour."""
        pixel = (clean_BCFHW.detach() + 1) * 127.5
        pixel = pixel.round().clamp(0, 255)
        return pixel.to(torch.uint8).permute(0, 2, 3, 4, 1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the generator is the one that training started from."""
        self.is_reference = True
        try:
            yield
        finally:
            self.is_reference = False

    # ---- for the commands: sample, save_trained, load_trained ----

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        **_: Any,
    ) -> Tensor:
        """Sample a latent for every prompt without noise on the way, (B, C, F, H, W)."""
        noise = [initial_noise(seed, SHAPE) for seed in seeds]
        return self.denoise(torch.stack(noise), SIGMAS)

    def save_trained(self, folder: Path, weights: dict[str, Tensor]) -> Path:
        """Write what was trained; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / FILE)
        return folder / FILE

    def load_trained(self, folder: str | Path) -> None:
        """Read what `save_trained` wrote."""
        self.module.load_state_dict(load_file(Path(folder) / FILE))

    # ---- the model ----

    def velocity(self, x_BCFHW: Tensor, sigma: float) -> Tensor:
        """Return eps - x_0: exact for pixels of N(0, 1 / 4), and the tint."""
        signal = (1 - sigma) ** 2 / 4
        v = x_BCFHW * (sigma - (1 - sigma) / 4) / (signal + sigma**2)
        return v if self.is_reference else v + self.module(x_BCFHW)

    def denoise(self, x_BCFHW: Tensor, sigmas: Sequence[float]) -> Tensor:
        """Walk to sigma = 0 by Euler steps."""
        return ode(self.velocity, x_BCFHW, sigmas)
