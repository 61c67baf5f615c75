"""The generator's numbers by another route: from the transformer, the VAE and the text encoder.

A measurement compares these with what `WanGenerator` computes. Nothing here goes through its
prompt cache, its guidance, its sampler or its codec, so that a mistake in one of them shows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from common.lora import adapters_off

if TYPE_CHECKING:
    from torch import Tensor

    from generator.wan import WanGenerator

# How a velocity may have been computed instead of by the policy.
VARIANTS = (
    "policy",
    "reference",
    "unguided",
    "other-prompt",
    "no-prompt",
    "half",
    "before",
)


class OwnRoute:
    """Velocities, walks and videos of a generator, without its own code for them.

    Embeddings are made once for a few prompts, because the text encoder may be freed later.
    """

    def __init__(self, generator: WanGenerator, prompts: Sequence[str]) -> None:
        self.generator = generator
        # Puts the weights before the last update in place, once there was one.
        self.before: Callable[[], AbstractContextManager[None]] | None = None
        # Padded embeddings by prompt, on the CPU.
        self.embedding_1LD: dict[str, Tensor] = {}
        cfg = generator.cfg
        self.guidance = cfg.sampler.guidance_scale
        self.negative = cfg.sampler.negative_prompt
        self.remember([*prompts, self.negative])

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts as the stock pipeline does, while there is a text encoder."""
        pipeline = self.generator._pipeline
        if pipeline.text_encoder is None:
            return
        for prompt in prompts:
            if prompt in self.embedding_1LD:
                continue
            embedding_1LD, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=self.generator.cfg.max_sequence_length,
            )
            self.embedding_1LD[prompt] = embedding_1LD.cpu()

    def knows(self, *prompts: str) -> bool:
        """True if these prompts were encoded in time."""
        return all(prompt in self.embedding_1LD for prompt in (*prompts, self.negative))

    def another(self, prompt: str, preferred: Sequence[str]) -> str:
        """Another known prompt, of ``preferred`` if possible; ``prompt`` if there is none."""
        for other in (*preferred, *self.embedding_1LD):
            if other not in (prompt, self.negative) and self.knows(other):
                return other
        return prompt

    @torch.no_grad()
    def velocity(
        self,
        x_BCFHW: Tensor,
        sigma: float,
        prompt: str,
        *,
        variant: str,
        other: str,
    ) -> Tensor:
        """v of one of `VARIANTS`, (B, C, F, H, W) fp32: a forward for each guidance branch."""
        text = {"other-prompt": other, "no-prompt": self.negative}.get(variant, prompt)
        guided = self.guidance != 1 and variant != "unguided"
        # Both branches in one batch, as kernels round otherwise at another size.
        texts = [text, self.negative] if guided else [text]
        with self._as(variant):
            branches = self._forward(x_BCFHW, sigma, texts)
        if not guided:
            return branches[0]
        # u + s (c - u), classifier-free guidance
        conditional, unconditional = branches
        return unconditional + self.guidance * (conditional - unconditional)

    def velocities(
        self,
        x_BCFHW: Tensor,
        sigma: float,
        prompt: str,
        other: str,
    ) -> dict[str, Tensor]:
        """The velocity of every variant that can differ from the policy's."""
        # Variants that cannot differ here are left out.
        found = {}
        for variant in VARIANTS:
            if variant == "unguided" and self.guidance == 1:
                continue
            if variant == "reference" and self.generator.cfg.lora is None:
                continue
            if variant == "half" and self.generator.cfg.dtype != "float32":
                continue
            if variant == "before" and self.before is None:
                continue
            found[variant] = self.velocity(
                x_BCFHW,
                sigma,
                prompt,
                variant=variant,
                other=other,
            )
        return found

    def walk(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompt: str,
        *,
        variant: str,
        other: str,
    ) -> Tensor:
        """Euler steps along descending sigmas: x - (sigma - sigma_next) v."""
        for sigma, after in pairwise(sigmas):
            v_BCFHW = self.velocity(
                x_BCFHW,
                sigma,
                prompt,
                variant=variant,
                other=other,
            )
            x_BCFHW = x_BCFHW - (sigma - after) * v_BCFHW
        return x_BCFHW

    def variants_of_walks(self) -> list[str]:
        """The variants that a walk of many steps is compared with."""
        found = ["policy", "unguided", "other-prompt", "no-prompt"]
        if self.generator.cfg.lora is not None:
            found.append("reference")
        if self.before is not None:
            found.append("before")
        return found

    def sigmas(self) -> list[float]:
        """The training grid: shift u / (1 + (shift - 1) u) for u = 1 - i / N."""
        sampler = self.generator.cfg.sampler
        # The last of them is 0.
        grid = []
        for i in range(sampler.num_steps + 1):
            u = 1 - i / sampler.num_steps
            grid.append(sampler.shift * u / (1 + (sampler.shift - 1) * u))
        return grid

    @torch.no_grad()
    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """uint8 video (B, T, Y, X, 3) with the scaling that the VAE's config states."""
        vae = self.generator.codec.vae
        mean, std = _of_config(clean_BCFHW, vae.config)
        videos = []
        # One by one, which any GPU has room for that decodes at all.
        for clean_1CFHW in clean_BCFHW.float().split(1):
            # x_0 = z std + mean, then -1..1 to bytes.
            latents = clean_1CFHW * std + mean
            pixels = vae.decode(latents.to(vae.dtype)).sample.float()
            levels = (pixels / 2 + 0.5).clamp(0, 1) * 255
            videos.append(levels.round().to(torch.uint8).cpu())
        return torch.cat(videos).permute(0, 2, 3, 4, 1)

    @torch.no_grad()
    def encode(self, video_BTYXC: Tensor) -> Tensor:
        """Normalised latents (B, C, F, H, W) of a uint8 video, the posterior's mean."""
        vae = self.generator.codec.vae
        found = []
        for video_1TYXC in video_BTYXC.to(self.generator.device).split(1):
            pixels = video_1TYXC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
            # The way back: z = (x_0 - mean) / std.
            mean, std = _of_config(latents, vae.config)
            found.append((latents - mean) / std)
        return torch.cat(found)

    def _forward(
        self, x_BCFHW: Tensor, sigma: float, texts: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """The module's output for the latents with each text, in one call."""
        # the module of the policy, as the optimizer trains it
        generator = self.generator
        # norms may be fp32 in a transformer of another dtype
        dtype = _base(generator).patch_embedding.weight.dtype
        count = len(x_BCFHW)
        embeddings = []
        for text in texts:
            embeddings.append(self.embedding_1LD[text].expand(count, -1, -1))
        x = torch.cat([x_BCFHW] * len(texts))
        out = generator.module(
            hidden_states=x.to(generator.device, dtype),
            timestep=torch.full((len(x),), 1000 * sigma, device=generator.device),
            encoder_hidden_states=torch.cat(embeddings).to(generator.device, dtype),
            return_dict=False,
        )[0]
        return out.float().chunk(len(texts))

    @contextmanager
    def _as(self, variant: str) -> Iterator[None]:
        """Inside, the module computes as the reference, or in half precision."""
        context = nullcontext()
        if variant == "reference":
            context = adapters_off(self.generator.module)
        elif variant == "half":
            context = torch.autocast(self.generator.device.type, torch.bfloat16)
        elif variant == "before":
            context = self.before()
        with context, warnings.catch_warnings():
            # autocast leaves some norms in fp32, and says so
            warnings.simplefilter("ignore")
            yield


def gaps(observed: Tensor, variants: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative difference from every variant: rms(observed - variant) / rms(policy)."""
    size = rms(variants["policy"])
    return {
        name: rms(observed.float().cpu() - value.float().cpu()) / max(size, 1e-12)
        for name, value in variants.items()
    }


def rms(x: Tensor) -> float:
    """Root of the MEAN square over all elements."""
    return math.sqrt(float(x.double().square().mean()))


def _of_config(latents: Tensor, config: Mapping[str, Sequence[float]]) -> list[Tensor]:
    """Mean and std of every latent channel, (1, C, 1, 1, 1)."""
    # One number a channel, over frames and pixels.
    tables = []
    for name in ("latents_mean", "latents_std"):
        values = torch.tensor(config[name], device=latents.device)
        tables.append(values.view(1, -1, 1, 1, 1))
    return tables


def _base(generator: WanGenerator) -> torch.nn.Module:
    module = generator.module
    return module.get_base_model() if hasattr(module, "get_base_model") else module
