"""Read exported files with stock diffusers and collect its warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from generator.sampler import initial_noise
from tests.tiny import FRAMES, HEIGHT, MAX_LENGTH, WIDTH

if TYPE_CHECKING:
    from diffusers import WanPipeline

# Wan-2.1-T2V-1.3B's transformer/config.json
WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


@contextmanager
def remarks(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What diffusers logs inside. Its logger hands nothing on to the root, where pytest listens."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("diffusers"), Listener()
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(level)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)


def tiny_pipeline(folder: Path, **parts: Any) -> WanPipeline:
    """In fp32, as it is published."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, **parts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def large_pipeline() -> WanPipeline:
    """Return Wan 2.1 1.3B's transformer on the meta device."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(dict(WAN_1_3B))
    steps = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=steps,
        transformer=transformer,
    )


def adapter_of(pipeline: WanPipeline) -> dict[str, torch.Tensor]:
    """The adapter's tensors in a pipeline that has loaded one, by the names of its file."""
    return {
        f"transformer.{name.replace('.default_0.', '.')}": value.detach()
        for name, value in pipeline.transformer.named_parameters()
        if ".lora_" in name
    }


def latents(
    pipeline: WanPipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int
) -> torch.Tensor:
    """Sampled by the pipeline itself, texts and all, with guidance 3: (B, C, F, H, W)."""
    shape = (16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    return pipeline(
        prompt=list(prompts),
        negative_prompt=[""] * len(prompts),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=torch.stack([initial_noise(seed, shape) for seed in seeds]),
        max_sequence_length=MAX_LENGTH,
        output_type="latent",
    ).frames
