"""Tiny folders of each family of Wan, with loud random weights, and samples of stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generator.schedule import sigma_grid
from generator.stock_check import OwnGrid
from tests.tiny import FRAMES, HEIGHT, MAX_LENGTH, WIDTH, _louder, byte_tokenizer
from tests.tiny import _text_encoder as text_encoder
from tests.tiny import _vae as vae_21


def transformer(channels: int = 16, **changes: Any) -> nn.Module:
    """A transformer of three blocks that reads and writes so many channels."""
    from diffusers import WanTransformer3DModel

    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return _louder(WanTransformer3DModel(**{**sizes, **changes}), gain=1.5)


def vae_22() -> nn.Module:
    """The layout of Wan 2.2 TI2V-5B's VAE: 48 channels, 16 pixels to a latent."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1] * 48,
        latents_std=[0.7] * 48,
    )
    return _louder(model, gain=1.0)


def build_family(folder: Path, kind: str) -> Path:
    """Write a tiny folder of "T2V-A14B", "TI2V-5B", "I2V-A14B" or "I2V-14B" (Wan 2.1)."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": text_encoder(len(tokenizer)),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        if kind == "TI2V-5B":
            parts |= {"vae": vae_22(), "transformer": transformer(48)}
            parts["expand_timesteps"] = True
        if kind == "T2V-A14B":
            parts |= {"vae": vae_21(8, 4), "transformer": transformer()}
            parts |= {"transformer_2": transformer(), "boundary_ratio": 0.875}
        # an image's mask and latent are 4 and 16 channels beside the latent's 16
        reads = {"in_channels": 36}
        if kind == "I2V-A14B":
            parts |= {"vae": vae_21(8, 4), "transformer": transformer(**reads)}
            parts |= {"transformer_2": transformer(**reads), "boundary_ratio": 0.9}
        if kind == "I2V-14B":
            clip = {"image_dim": 20, "added_kv_proj_dim": 32}
            parts |= {"vae": vae_21(8, 4), "transformer": transformer(**reads, **clip)}
            parts |= clip_vision()
        images = kind.startswith("I2V")
        pipeline = WanImageToVideoPipeline if images else WanPipeline
        pipeline(**parts).save_pretrained(folder)
    return folder


def clip_vision() -> dict[str, Any]:
    """A tiny CLIP of 257 tokens and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=14,
        image_size=224,
        hidden_act="gelu",
    )
    model = _louder(CLIPVisionModel(config), gain=1.0)
    return {"image_encoder": model, "image_processor": CLIPImageProcessor()}


def write_image(file: Path, seed: int) -> str:
    """Write an image of another size than the video, of random patches."""
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8, generator=draw)
    Image.fromarray(small.numpy()).resize((50, 60)).save(file)
    return str(file)


def stock(folder: Path, *, images: bool = False) -> Any:
    """The folder's pipeline in fp32, for texts or for images."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    kind = WanImageToVideoPipeline if images else WanPipeline
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(
    pipeline: Any,
    noise_BCFHW: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    shift: float,
    **options: Any,
) -> Tensor:
    """Clean latents of a stock pipeline on our grid, from this noise."""
    pipeline.scheduler = OwnGrid(shift=shift)
    values = {
        "negative_prompt": [""] * len(prompts),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "max_sequence_length": MAX_LENGTH,
    }
    return pipeline(
        prompt=list(prompts),
        num_inference_steps=steps,
        latents=noise_BCFHW,
        output_type="latent",
        **{**values, **options},
    ).frames


def gap(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def sigmas_of(steps: int, shift: float) -> list[float]:
    """Noise levels of a grid."""
    return sigma_grid(steps, shift=shift).tolist()


def build_anyflow(folder: Path) -> Path:
    """Write a tiny AnyFlowPipeline whose two embedders of time differ."""
    from diffusers import (
        AnyFlowPipeline,
        AnyFlowTransformer3DModel,
        FlowMapEulerDiscreteScheduler,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        model = AnyFlowTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=3,
            rope_max_seq_len=64,
        )
        AnyFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder(len(tokenizer)),
            transformer=_louder(model, gain=1.5),
            vae=vae_21(8, 4),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        ).save_pretrained(folder)
    return folder
