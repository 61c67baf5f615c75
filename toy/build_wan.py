"""The tiny Wan: WanTransformer3DModel and UMT5 trained by flow matching on captions that are sometimes wrong.

Real captions are noisy; here every attribute of a caption is redrawn with some probability, more often towards the end
(`PHASES`). So the base knows what every word looks like but does not obey it reliably: alignment has something to do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

from generator.schedule import sigma_grid
from toy.pixels import to_bytes, to_unit
from toy.tokenizer import train_tokenizer
from toy.training import fit
from toy.world import (
    VALUES,
    Attributes,
    all_attributes,
    caption,
    captions,
    measure,
    random_attributes,
    random_scene,
    render,
    split_attributes,
)

BATCH, STEPS, PEAK = 32, 8000, 2e-3
CLIPS, TOKENS, SHIFT = 8000, 32, 3.0
PROMPT_DROP = 0.1
# (name, steps, peak rate, caption noise): first the world, then what web-scale captions do to obedience
PHASES = (("wan", STEPS, PEAK, 0.1), ("wan_noisy", 900, 6e-4, 0.55))


class Base(nn.Module):
    """What is trained together: the text encoder and the transformer. The VAE is frozen beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        texts = captions(all_attributes()) * 3
        self.tokenizer = train_tokenizer(
            texts,
            size=340,
            special=["<pad>", "</s>"],
            pad="<pad>",
            eos="</s>",
            end_with_eos=True,
        )
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                dropout_rate=0.0, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
            )
        )  # fmt: skip
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=320, num_layers=4, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )  # fmt: skip
        # zero velocity at first, as diffusion transformers are usually started
        nn.init.zeros_(self.transformer.proj_out.weight)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """As WanPipeline does it: padded to `TOKENS`, zero after the text's end."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        hidden = self.text_encoder(
            tokens.input_ids, tokens.attention_mask
        ).last_hidden_state
        return hidden * tokens.attention_mask[..., None]

    def velocity(self, x: Tensor, sigma_B: Tensor, embedding: Tensor) -> Tensor:
        return self.transformer(x, 1000 * sigma_B, embedding, return_dict=False)[0]


def training_clips(
    vae: AutoencoderKLWan, cache: Path
) -> tuple[Tensor, list[Attributes]]:
    """`CLIPS` normalised latents of random scenes over the training combinations, encoded once."""
    rng = random.Random("wan clips")
    train, _ = split_attributes()
    scenes = [random_scene(rng.choice(train), rng) for _ in range(CLIPS)]
    if not cache.exists():
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        chunks = []
        with torch.no_grad():
            for start in tqdm(range(0, CLIPS, 50), desc="encoding", mininterval=5):
                latent = vae.encode(
                    to_unit(render(scenes[start : start + 50]))
                ).latent_dist.mode()
                chunks.append((latent - mean) / std)
        save_file({"latent": torch.cat(chunks)}, cache)
    return load_file(cache)["latent"], [scene.attributes for scene in scenes]


def noisy_caption(attributes: Attributes, rng: random.Random, *, wrong: float) -> str:
    """A caption in a random wording, each attribute redrawn with probability ``wrong``; sometimes none at all."""
    if rng.random() < PROMPT_DROP:
        return ""
    other = random_attributes(rng)
    mixed = {
        k: getattr(other if rng.random() < wrong else attributes, k) for k in VALUES
    }
    return caption(Attributes(**mixed), wording=rng.randrange(4))


@torch.no_grad()
def sample(
    base: Base,
    vae: AutoencoderKLWan,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Euler ODE on our grid with classifier-free guidance -> uint8 (B, T, Y, X, 3)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((len(prompts), 16, 3, 8, 8), generator=draw)
    embedding = base.embed([*prompts, *[""] * len(prompts)])
    grid = [float(s) for s in sigma_grid(steps, shift=SHIFT)]
    for sigma, after in itertools.pairwise(grid):
        both = base.velocity(
            torch.cat([x, x]), torch.full((2 * len(x),), sigma), embedding
        )
        conditional, unconditional = both.chunk(2)
        x = x + (after - sigma) * (
            unconditional + guidance * (conditional - unconditional)
        )
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return to_bytes(vae.decode(x * std + mean, return_dict=False)[0])


def evaluate(
    base: Base, vae: AutoencoderKLWan, *, count: int, seed: int, guidance: float
) -> dict[str, float]:
    """Oracle MEAN over held-out prompts, total and per sub-dimension (in [0, 1])."""
    rng = random.Random(seed)
    _, heldout = split_attributes()
    prompts = [
        caption(rng.choice(heldout), wording=rng.randrange(4)) for _ in range(count)
    ]
    sums: dict[str, float] = {"oracle": 0.0}
    for start in range(0, count, 32):
        part = prompts[start : start + 32]
        for video, prompt in zip(
            sample(base, vae, part, seed=seed + start, steps=10, guidance=guidance),
            part,
            strict=True,
        ):
            verdict = measure(video, prompt)
            sums["oracle"] += verdict.total
            for name, score in verdict.scores.items():
                sums[name] = sums.get(name, 0.0) + score / 2
    return {
        f"{name}_cfg{guidance:g}": value / count for name, value in sums.items()
    } | {"n": count}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train, measure on held-out prompts, save a WanPipeline folder to ``out/wan``."""
    vae = AutoencoderKLWan.from_pretrained(out / "wan" / "vae").float().eval()
    latents, attributes = training_clips(vae, work / "wan_clips.safetensors")
    base = Base()

    def loss_at(step: int, *, name: str, wrong: float) -> Tensor:
        rng = random.Random(f"{name}-{step}")
        rows = [rng.randrange(CLIPS) for _ in range(BATCH)]
        clean = latents[rows]
        uniform = torch.rand(BATCH)
        sigma_B = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        mix = sigma_B.view(-1, 1, 1, 1, 1)
        embedding = base.embed(
            [noisy_caption(attributes[row], rng, wrong=wrong) for row in rows]
        )
        velocity = base.velocity((1 - mix) * clean + mix * noise, sigma_B, embedding)
        return ((velocity - (noise - clean)) ** 2).mean()

    def check() -> dict[str, float]:
        return evaluate(base, vae, count=64, seed=1, guidance=1.0) | evaluate(
            base, vae, count=64, seed=1, guidance=3.0
        )

    for name, count, peak, wrong in PHASES:
        loss = partial(loss_at, name=name, wrong=wrong)
        fit(
            name,
            base,
            loss,
            steps=steps or count,
            peak=peak,
            work=work,
            evaluate=check,
            every=750,
        )
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
    vae.half()
    pipeline.save_pretrained(out / "wan")
    vae.float()
    measured = evaluate(base, vae, count=256, seed=2, guidance=1.0)
    return measured | evaluate(base, vae, count=256, seed=2, guidance=3.0)
