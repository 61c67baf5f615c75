"""Train the tiny Wan (WanTransformer3DModel and UMT5) by flow matching on noisy captions.

Real captions are noisy; here every attribute of a caption is redrawn with some probability, more
often towards the end (`PHASES`). The base model therefore knows every word but does not follow it
reliably, which leaves room for alignment.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

from common.strict_loading import load_pretrained
from generator.schedule import sigma_grid
from toy.measure import measure
from toy.pixels import to_bytes, to_unit
from toy.tokenizer import train_tokenizer
from toy.training import Fit, cached, fit
from toy.world import (
    Attributes,
    caption,
    captions,
    mix_attributes,
    random_attributes,
    random_scene,
    redrawn,
    render,
    split_attributes,
)

BATCH = 32
CLIPS = 8000
TOKENS = 32
SHIFT = 3.0
PROMPT_DROP = 0.1
# (name, steps, peak rate, caption noise): clean captions first, then web-scale noise.
PHASES = (("wan", 8000, 2e-3, 0.1), ("wan_noisy", 900, 6e-4, 0.55))


class Base(nn.Module):
    """The prompt encoder and the transformer, which train together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer = train_tokenizer(
            captions(split_attributes()[0]) * 3,
            size=340,
            special=["<pad>", "</s>"],
            pad="<pad>",
            eos="</s>",
            end_with_eos=True,
        )
        text_config = UMT5Config(
            vocab_size=len(self.tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.text_encoder = UMT5EncoderModel(text_config)

        # 16 channels of the VAE; 4 heads of 32.
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=320,
            num_layers=4,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
        # Zero velocity at first, as diffusion transformers usually start.
        nn.init.zeros_(self.transformer.proj_out.weight)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, see `embed`."""
        return embed(self.tokenizer, self.text_encoder, prompts)

    def velocity(self, x: Tensor, sigma_B: Tensor, embedding: Tensor) -> Tensor:
        """Predict eps - x_0 at noise level sigma."""
        # The transformer counts time from 0 to 1000.
        output = self.transformer(x, 1000 * sigma_B, embedding, return_dict=False)
        return output[0]


def embed(
    tokenizer: Any, text_encoder: UMT5EncoderModel, prompts: Sequence[str]
) -> Tensor:
    """Embed prompts as WanPipeline does: padded to `TOKENS`, zero after the text."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )

    # The padding is zero for the transformer.
    mask = tokens.attention_mask
    hidden = text_encoder(tokens.input_ids, mask).last_hidden_state
    return hidden * mask[..., None]


@torch.no_grad()
def training_clips(
    vae: AutoencoderKLWan, cache: Path
) -> tuple[Tensor, list[Attributes]]:
    """Encode `CLIPS` random scenes over the training combinations; cached in a file.

    Returns normalised latents and the attributes of each.
    """
    rng = random.Random("wan clips")
    train, _ = split_attributes()
    scenes = [random_scene(rng.choice(train), rng) for _ in range(CLIPS)]

    def encode() -> Tensor:
        mean, std = latent_statistics(vae)
        chunks = []
        for start in tqdm(range(0, CLIPS, 50), desc="encoding", mininterval=5):
            unit = to_unit(render(scenes[start : start + 50]))
            latent = vae.encode(unit).latent_dist.mode()
            chunks.append((latent - mean) / std)
        return torch.cat(chunks)

    attributes = [scene.attributes for scene in scenes]
    return cached(cache, "latent", encode), attributes


def latent_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (1, C, 1, 1, 1) each."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return mean, std


def noisy_caption(attributes: Attributes, rng: random.Random, *, wrong: float) -> str:
    """Write a caption whose attributes are redrawn with probability ``wrong`` each.

    With probability `PROMPT_DROP` it is empty, for classifier-free guidance.
    """
    if rng.random() < PROMPT_DROP:
        return ""

    def mix(rng: random.Random) -> Attributes:
        return mix_attributes(attributes, random_attributes(rng), rng, share=wrong)

    # No caption names a held-out combination.
    return caption(redrawn(mix, rng), wording=rng.randrange(4))


@torch.no_grad()
def sample(
    base: Base,
    vae: AutoencoderKLWan,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance: float,
) -> Tensor:
    """Sample by the Euler ODE in 10 steps with guidance; returns uint8 (B, T, Y, X, 3)."""
    # Noise, then the embeddings with and without the prompt.
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((len(prompts), 16, 3, 8, 8), generator=draw)
    embedding = base.embed([*prompts, *[""] * len(prompts)])
    grid = [float(s) for s in sigma_grid(10, shift=SHIFT)]

    # Euler steps with classifier-free guidance.
    for sigma, after in itertools.pairwise(grid):
        sigma_B = torch.full((2 * len(x),), sigma)
        velocity = base.velocity(torch.cat([x, x]), sigma_B, embedding)
        conditional, unconditional = velocity.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        x = x + (after - sigma) * guided

    return decode(vae, x)


def decode(vae: AutoencoderKLWan, clean: Tensor) -> Tensor:
    """Decode normalised latents: uint8 (B, T, Y, X, 3)."""
    # The VAE decodes latents of their natural scale.
    mean, std = latent_statistics(vae)
    decoded = vae.decode(clean * std + mean, return_dict=False)[0]
    return to_bytes(decoded)


def heldout_prompts(count: int, seed: int) -> list[str]:
    """Captions of held-out combinations, drawn from a seed."""
    rng = random.Random(seed)
    _, heldout = split_attributes()
    return [
        caption(rng.choice(heldout), wording=rng.randrange(4)) for _ in range(count)
    ]


def evaluate(
    base: Base, vae: AutoencoderKLWan, *, count: int, seed: int
) -> dict[str, float]:
    """Measure oracle scores without guidance and with scale 3: MEAN over held-out prompts.

    The total and the sub-dimension scores are in [0, 1].
    """
    prompts = heldout_prompts(count, seed)

    # SUM over all videos, in parts that fit in memory.
    sums: Counter[str] = Counter()
    for guidance, start in itertools.product((1.0, 3.0), range(0, count, 32)):
        part = prompts[start : start + 32]
        videos = sample(base, vae, part, seed=seed + start, guidance=guidance)
        for video, prompt in zip(videos, part, strict=True):
            score = measure(video, prompt)
            sums[f"oracle_cfg{guidance:g}"] += score.total
            for name, value in score.scores.items():
                sums[f"{name}_cfg{guidance:g}"] += value / 2
    means = {name: value / count for name, value in sums.items()}
    return {**means, "n": count}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train, save a WanPipeline folder to ``out/wan`` and measure on held-out prompts."""
    vae = load_pretrained(AutoencoderKLWan, out / "wan" / "vae").float().eval()
    latents, attributes = training_clips(vae, work / "wan_clips.safetensors")
    base = Base()

    def loss_at(step: int, *, name: str, wrong: float) -> Tensor:
        """Flow matching: MEAN of (v - (eps - x_0))^2 over clips and latent elements."""
        rng = random.Random(f"{name}-{step}")
        rows = [rng.randrange(CLIPS) for _ in range(BATCH)]
        clean = latents[rows]

        # Noise levels on the shifted schedule that sampling uses.
        uniform = torch.rand(BATCH)
        sigma_B = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        mix = sigma_B.view(-1, 1, 1, 1, 1)
        noisy = (1 - mix) * clean + mix * noise

        # Predict the velocity under noisy captions.
        texts = [noisy_caption(attributes[row], rng, wrong=wrong) for row in rows]
        embedding = base.embed(texts)
        velocity = base.velocity(noisy, sigma_B, embedding)
        error = velocity - (noise - clean)
        return (error**2).mean()

    # Each phase has its own captions and learning rate.
    for name, count, peak, wrong in PHASES:
        fit(
            Fit(name, steps or count, peak, work, every=750),
            base,
            partial(loss_at, name=name, wrong=wrong),
            lambda: evaluate(base, vae, count=64, seed=1),
        )
    _save(base, vae, out / "wan")
    return evaluate(base, vae, count=256, seed=2)


def _save(base: Base, vae: AutoencoderKLWan, folder: Path) -> None:
    """Save the pipeline, its VAE in fp16; all modules are in fp32 afterwards."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=SHIFT,
    )
    pipeline = WanPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder.eval(),
        transformer=base.transformer.eval(),
        vae=vae,
        scheduler=scheduler,
    )

    # Only the VAE is saved in fp16.
    vae.half()
    pipeline.save_pretrained(folder)
    vae.float()
