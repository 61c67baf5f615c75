"""The tiny AutoencoderKLWan: 4x in space, 2x in time, 16 channels, trained on rendered clips."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from toy.pixels import to_bytes, to_unit
from toy.training import fit
from toy.world import (
    SUB_DIMENSIONS,
    caption,
    measure,
    random_attributes,
    random_scene,
    render,
)

CONFIG = {
    "base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
}
BATCH, STEPS, PEAK = 8, 2400, 3e-3
LATENT_NOISE = 0.1  # the decoder learns to forgive the generator's errors of that size (latents have std near 1)


def clips(count: int, rng: random.Random) -> Tensor:
    """Random rendered clips, uint8 (B, T, Y, X, 3)."""
    return render([random_scene(random_attributes(rng), rng) for _ in range(count)])


def decode_unclamped(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """`vae.decode` without its final clamp to [-1, 1], which would stop the gradient of every overshooting pixel."""
    vae.clear_cache()
    x = vae.post_quant_conv(latent)
    chunks = []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        chunk = x[:, :, i : i + 1]
        chunks.append(
            vae.decoder(
                chunk,
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=i == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, *, count: int, seed: int) -> dict[str, float]:
    """Held-out PSNR (MEAN over clips, dB) and the share of sub-dimension scores the reconstruction keeps.

    The prompt of every clip has each attribute right only half of the time, so that the verdicts are not all 2.
    """
    rng = random.Random(seed)
    psnr = agree = 0.0
    for _ in range(count // 16):
        scenes = [random_scene(random_attributes(rng), rng) for _ in range(16)]
        video = render(scenes)
        unit = to_unit(video)
        decoded = vae.decode(vae.encode(unit).latent_dist.mode(), return_dict=False)[0]
        psnr += (
            (10 * torch.log10(4 / ((decoded - unit) ** 2).mean((1, 2, 3, 4))))
            .sum()
            .item()
        )
        for scene, before, after in zip(scenes, video, to_bytes(decoded), strict=True):
            other = random_attributes(rng)
            mixed = {
                k: rng.choice((v, getattr(scene.attributes, k)))
                for k, v in vars(other).items()
            }
            prompt = caption(type(other)(**mixed), wording=rng.randrange(4))
            first, second = (
                measure(before, prompt).scores,
                measure(after, prompt).scores,
            )
            agree += sum(first[k] == second[k] for k in SUB_DIMENSIONS) / len(
                SUB_DIMENSIONS
            )
    seen = count // 16 * 16
    return {"psnr_db": psnr / seen, "oracle_agreement": agree / seen, "n": seen}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train, measure on 512 held-out clips, save to ``out/wan/vae`` in fp16 with latents_mean and latents_std."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)

    def loss_at(step: int) -> Tensor:
        video = clips(BATCH, random.Random(f"vae-{step}"))
        unit = to_unit(video)
        chroma = (video.amax(-1).float() - video.amin(-1).float())[:, None]
        weight = (
            1 + 4 * (chroma > 30).float()
        )  # the shape is a tenth of the frame but most of what matters
        mean = vae.encode(unit).latent_dist.mean
        error = (
            decode_unclamped(vae, mean + LATENT_NOISE * torch.randn_like(mean)) - unit
        )
        # Without the last term the latents would grow until the noise no longer matters.
        return (weight * (error.abs() + 2 * error**2)).mean() + 1e-2 * (mean**2).mean()

    fit(
        "vae",
        vae,
        loss_at,
        steps=steps or STEPS,
        peak=PEAK,
        work=work,
        evaluate=lambda: evaluate(vae, count=64, seed=1),
    )
    with torch.no_grad():
        rng = random.Random("latent statistics")
        mean = torch.cat(
            [vae.encode(to_unit(clips(16, rng))).latent_dist.mode() for _ in range(32)]
        )
    vae.register_to_config(
        latents_mean=[round(x, 5) for x in mean.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(x, 5) for x in mean.std((0, 2, 3, 4)).tolist()],
    )
    vae.half().save_pretrained(out / "wan" / "vae")
    return evaluate(
        AutoencoderKLWan.from_pretrained(out / "wan" / "vae").float(), count=512, seed=2
    )
