"""An image generator in a package of its own: the U-Net of diffusers, with random weights.

    pip install -e examples/image_package
    python launch/grpo.py --config configs/shapes/grpo_oracle.yaml run_dir=runs/examples/image \\
        generator.target=tiny_image generator.num_frames=1 rewards.oracle=null \\
        rewards.warm.target=examples/my_reward.py:score

An image is a video of one frame. The U-Net predicts the clean image, which gives the velocity of
the rectified flow; its pixels need no VAE. A LoRA of peft is trained. Nothing is downloaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.gaussian import Gaussian
from common.memory import AdaptiveBatcher
from common.types import Group, Step, text_of
from generator.flow import Kernel
from generator.sampler import Members, Walk, initial_noise, ode, rollout_group
from generator.schedule import sigma_grid

if TYPE_CHECKING:
    from generator.config import GeneratorConfig

TEXT_WIDTH = 16
FILE = "tiny_image.safetensors"


class ImageGenerator:
    """Reads size, sampler and LoRA of the run's ``generator`` section."""

    def __init__(self, cfg: GeneratorConfig, *, seed: int = 0) -> None:
        """The base model is always the same; ``seed`` decides the LoRA's first weights."""
        if cfg.num_frames != 1:
            raise ValueError(
                f"generator.num_frames={cfg.num_frames} must be 1: these are images"
            )
        self.cfg = cfg
        self.shape = (3, 1, cfg.height, cfg.width)
        sampler = cfg.sampler
        self.sigmas = sigma_grid(sampler.num_steps, shift=sampler.shift).tolist()
        self.kernel = Kernel("sde", sampler.noise_level, sampler.max_std)
        # Random weights without touching the run's own random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = UNet2DConditionModel(
                sample_size=(cfg.height, cfg.width),
                in_channels=3,
                out_channels=3,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=8,
                norm_num_groups=8,
            )
            self.module.requires_grad_(requires_grad=False)
            torch.manual_seed(seed)
            lora = LoraConfig(
                r=cfg.lora.rank,
                lora_alpha=cfg.lora.alpha,
                target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv_out"],
            )
            self.module.add_adapter(lora)
        self.module.eval()

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
        """Sample a group for every prompt, with one stochastic step at a place of its seed."""
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            walk = Walk(
                shape=self.shape,
                sigmas=self.sigmas,
                steps=[seed % self.cfg.sampler.stochastic_range],
                kernel=self.kernel,
                tail=lambda x, sigmas, p=prompt: ode(self._velocity(p), x, sigmas),
            )
            with torch.no_grad():
                group = rollout_group(
                    self._velocity(prompt),
                    Members(prompt, seed, group_size, first_member),
                    walk,
                    batch=AdaptiveBatcher(self.cfg.rollout_batch, what="latents"),
                )
            groups.append(group)
        return groups

    def transition(self, prompt: str, step: Step) -> Gaussian:
        """Return the Gaussian that a stochastic step draws from, in one forward with gradient."""
        x_BCFHW = step.latent_MCFHW
        v_BCFHW = self._velocity(prompt)(x_BCFHW, step.sigma)
        return self.kernel.transition(x_BCFHW, v_BCFHW, step.sigma, step.sigma_next)

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Make uint8 videos (B, 1, Y, X, 3) of pixels in [-1, 1]."""
        pixel = (clean_BCFHW.detach() + 1) * 127.5
        pixel = pixel.round().clamp(0, 255)
        return pixel.to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the LoRA is off."""
        self.module.disable_adapters()
        try:
            yield
        finally:
            self.module.enable_adapters()

    # ---- for the commands: sample, save_trained, load_trained ----

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **_: Any) -> Tensor:
        """Sample a latent for every prompt without noise on the way, (B, C, F, H, W)."""
        clean = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            noise_1CFHW = initial_noise(seed, self.shape)[None]
            clean.append(ode(self._velocity(prompt), noise_1CFHW, self.sigmas))
        return torch.cat(clean)

    def save_trained(self, folder: Path, weights: dict[str, Tensor]) -> Path:
        """Write the LoRA; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / FILE)
        return folder / FILE

    def load_trained(self, folder: str | Path) -> None:
        """Read what `save_trained` wrote; raise ValueError for the LoRA of another model."""
        weights = load_file(Path(folder) / FILE)
        unknown = self.module.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(
                f"{folder}/{FILE}: {unknown[0]} is no weight of this model"
            )

    # ---- the model ----

    def _velocity(self, prompt: str) -> Callable[[Tensor, float], Tensor]:
        """Return (x_BCFHW, sigma) -> eps - x_0.

        x = (1 - sigma) x_0 + sigma eps, so that eps - x_0 = (x - x_0) / sigma. The model predicts
        x_0.
        """
        text_1LD = embed(text_of(prompt))

        def velocity(x_BCFHW: Tensor, sigma: float) -> Tensor:
            x_BCYX = x_BCFHW.squeeze(2)
            time_B = torch.full((len(x_BCYX),), 1000 * sigma)
            text_BLD = text_1LD.expand(len(x_BCYX), -1, -1)
            clean_BCYX = self.module(x_BCYX, time_B, text_BLD).sample
            v_BCYX = (x_BCYX - clean_BCYX) / sigma
            return v_BCYX.unsqueeze(2)

        return velocity


def embed(prompt: str) -> Tensor:
    """Embed words by their checksums, (1, L, D): a model of one's own has a text encoder."""
    rows = []
    for word in prompt.lower().split() or [""]:
        noise = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        rows.append(torch.randn(TEXT_WIDTH, generator=noise))
    return torch.stack(rows)[None]
