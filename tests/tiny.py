"""A WanPipeline folder of real classes with 40 thousand random weights.

Weights are drawn larger than by the classes' initialisation, with which a tiny transformer
hardly depends on prompt and timestep: tests would pass with either of them ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from generator.config import GeneratorConfig, LoraConfig, SamplerConfig
from generator.schedule import stochastic_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from generator.wan import WanGenerator

PROMPTS = ("a red circle", "a blue square", "two cats", "rain")
HEIGHT, WIDTH, FRAMES = (
    32,
    32,
    9,
)  # pixels; latents are 16 x 3 x 4 x 4 at the default compression
MAX_LENGTH = 24  # text tokens after padding; the tokenizer makes one per byte


def build_tiny_wan(
    folder: Path,
    *,
    seed: int = 0,
    spatial: int = 8,
    temporal: int = 4,
    scheduler: str = "unipc",
    layers: int = 2,
) -> Path:
    """Write a WanPipeline; its VAE compresses by spatial (4 or 8) and temporal (2 or 4).

    scheduler  "unipc" (as published for Wan 2.1) or "euler"
               (FlowMatchEulerDiscreteScheduler); both with shift 3
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
    )

    if scheduler == "unipc":
        steps = UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=3.0,
        )
    else:
        steps = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=_vae(spatial, temporal),
            scheduler=steps,
            transformer=_transformer(layers),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_config(folder: Path, **changes: object) -> GeneratorConfig:
    """Six guided steps in fp32 with a LoRA of rank 4 and alpha 8, at the tiny size."""
    values = {
        "path": str(folder),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "fps": 8.0,
        "dtype": "float32",
        "lora": LoraConfig(rank=4, alpha=8.0),
        "sampler": SamplerConfig(num_steps=6, stochastic_range=3, guidance_scale=3.0),
        "gradient_checkpointing": False,
        "decode_batch": 8,
        "max_sequence_length": MAX_LENGTH,
    }
    return GeneratorConfig(**{**values, **changes})


def tiny_generator(
    folder: Path, *, device: torch.device | str = "cpu", **changes: object
) -> WanGenerator:
    """Load with a random B in each adapter, so that policy and reference differ."""
    from generator.wan import WanGenerator

    generator = WanGenerator.load(tiny_config(folder, **changes), device=device)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in generator.module.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return generator


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token for each byte, then `</s>`; it needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _text_encoder(vocabulary: int) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return UMT5EncoderModel(config).eval()


def _transformer(layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return _louder(model, gain=1.5)


def _vae(spatial: int, temporal: int) -> nn.Module:
    from diffusers import AutoencoderKLWan

    levels = int(math.log2(spatial))
    halvings = int(math.log2(temporal))
    model = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - halvings) + [True] * halvings,
        scale_factor_spatial=spatial,
        scale_factor_temporal=temporal,
    )
    return _louder(model, gain=1.0)


@torch.no_grad()
def _louder(model: nn.Module, *, gain: float) -> nn.Module:
    """Draw every matrix and kernel from N(0, gain^2 / fan_in) and every bias from N(0, 0.1^2)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, gain / math.sqrt(fan_in))
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
    return model.eval()


def stochastic_step(seed: int, end: int) -> int:
    """The one stochastic step that a group of this seed has, of the first ``end``."""
    (step,) = stochastic_steps(seed, SamplerConfig(num_steps=16, stochastic_range=end))
    return step
