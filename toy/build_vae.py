"""Train the tiny AutoencoderKLWan on rendered clips: 4x in space, 2x in time, 16 channels."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from common.strict_loading import load_pretrained
from toy.measure import measure
from toy.pixels import to_bytes, to_unit
from toy.training import Fit, fit
from toy.world import (
    Attributes,
    caption,
    random_attributes,
    random_scenes,
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
# Clips of a training step, and clips that are measured together.
BATCH = 8
EVALUATION_BATCH = 16
STEPS = 2400
PEAK = 3e-3
# The decoder learns to tolerate errors of that size (latents have std near 1).
LATENT_NOISE = 0.1


def clips(count: int, rng: random.Random) -> Tensor:
    """Render random scenes as uint8 (B, T, Y, X, 3)."""
    return render(random_scenes(count, rng))


def decode_unclamped(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """Decode without the final clamp of `vae.decode` to [-1, 1].

    The clamp would stop the gradient of every pixel that overshoots.
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latent)

    # A latent frame at a time, as `vae.decode` does.
    chunks = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunk = vae.decoder(
            hidden[:, :, i : i + 1],
            feat_cache=vae._feat_map,
            feat_idx=vae._conv_idx,
            first_chunk=i == 0,
        )
        chunks.append(chunk)
    vae.clear_cache()
    decoded = torch.cat(chunks, 2)
    return unpatchify(decoded, patch_size=vae.config.patch_size)


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, *, count: int, seed: int) -> dict[str, float]:
    """Measure PSNR (MEAN over clips, dB) and how often reconstructions get the same scores.

    ``oracle_agreement`` is the share of equal sub-dimension scores. The prompt of a clip has each
    attribute right about half of the time, so that the scores are not all 2.
    """
    rng = random.Random(seed)
    psnr = 0.0
    agree = 0.0
    batches = count // EVALUATION_BATCH
    for _ in range(batches):
        scenes = random_scenes(EVALUATION_BATCH, rng)
        video = render(scenes)
        unit = to_unit(video)
        latent = vae.encode(unit).latent_dist.mode()
        decoded = vae.decode(latent, return_dict=False)[0]

        # The range from -1 to 1 has a squared peak of 4.
        error = (decoded - unit) ** 2
        error = error.mean((1, 2, 3, 4))
        psnr += (10 * torch.log10(4 / error)).sum().item()
        restored = to_bytes(decoded)
        for scene, before, after in zip(scenes, video, restored, strict=True):
            prompt = _half_right_prompt(scene.attributes, rng)
            first = measure(before, prompt).scores
            second = measure(after, prompt).scores
            equal = [first[name] == second[name] for name in first]
            agree += sum(equal) / len(equal)
    clips_seen = batches * EVALUATION_BATCH
    return {
        "psnr_db": psnr / clips_seen,
        "oracle_agreement": agree / clips_seen,
        "n": clips_seen,
    }


def _half_right_prompt(attributes: Attributes, rng: random.Random) -> str:
    """Caption these attributes, each replaced by a random value with probability 1/2."""
    mixed = {}
    for name, value in vars(random_attributes(rng)).items():
        mixed[name] = rng.choice((value, getattr(attributes, name)))
    return caption(Attributes(**mixed), wording=rng.randrange(4))


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train, save to ``out/wan/vae`` in fp16 and measure on 512 held-out clips.

    The saved config holds latents_mean and latents_std.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)

    def loss_at(step: int) -> Tensor:
        video = clips(BATCH, random.Random(f"vae-{step}"))
        unit = to_unit(video)
        # The shape is a tenth of the frame but most of the information.
        chroma = video.amax(-1).float() - video.amin(-1).float()
        colored = chroma[:, None] > 30
        weight = 1 + 4 * colored.float()

        # Reconstruct from noisy latents.
        mean = vae.encode(unit).latent_dist.mean
        noisy = mean + LATENT_NOISE * torch.randn_like(mean)
        error = decode_unclamped(vae, noisy) - unit
        reconstruction = weight * (error.abs() + 2 * error**2)

        # Without this term the latents would grow until the noise no longer matters.
        penalty = 1e-2 * (mean**2).mean()
        return reconstruction.mean() + penalty

    fit(
        Fit("vae", steps or STEPS, PEAK, work),
        vae,
        loss_at,
        lambda: evaluate(vae, count=64, seed=1),
    )

    # The statistics that pipelines normalise latents with.
    rng = random.Random("latent statistics")
    latents = []
    with torch.no_grad():
        for _ in range(32):
            unit = to_unit(clips(16, rng))
            latents.append(vae.encode(unit).latent_dist.mode())
    latent = torch.cat(latents)
    mean = latent.mean((0, 2, 3, 4)).tolist()
    std = latent.std((0, 2, 3, 4)).tolist()
    vae.register_to_config(
        latents_mean=[round(x, 5) for x in mean],
        latents_std=[round(x, 5) for x in std],
    )

    # Measure the weights as they were saved, in fp16.
    folder = out / "wan" / "vae"
    vae.half().save_pretrained(folder)
    saved = load_pretrained(AutoencoderKLWan, folder).float()
    return evaluate(saved, count=512, seed=2)
