"""Load a Wan: the stock pipeline, every weight of it checked, and what is prepared once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from common.strict_loading import errors_of, load_pretrained
from common.weight_files import require_whole_folder
from generator import attention
from generator.family import FLOW_MAPS
from generator.flow_map import in_fp32
from generator.latents import store_channels_last

if TYPE_CHECKING:
    from torch import Tensor

    from generator.config import GeneratorConfig
    from generator.family import Family

# graphs of one block, see `compile_blocks`
COMPILED_GRAPHS = 64


def compile_blocks(transformer: WanTransformer3DModel) -> None:
    """Let torch.compile the blocks, each of them with the same graphs.

    A block has a graph for each way in which it is called: with and without gradient, with the
    adapter on and off, for each attention backend, and for each shape until shapes are dynamic.
    """
    # dynamo's default of 8 would leave some of them uncompiled, silently
    torch._dynamo.config.recompile_limit = max(
        COMPILED_GRAPHS, torch._dynamo.config.recompile_limit
    )
    transformer.compile_repeated_blocks()


def require_attention(cfg: GeneratorConfig, device: torch.device) -> None:
    """Raise ValueError for an attention backend that cannot run here."""
    for key, name in (
        ("generator.attention", cfg.attention),
        ("generator.sampler.attention", cfg.sampler.attention),
        ("generator.sampler.tail_attention", cfg.sampler.tail_attention),
    ):
        if name is not None:
            attention.require_backend(key, name, device)


def trained_first(cfg: GeneratorConfig, family: Family) -> list[str]:
    """Folders of the transformers, that of the trained one first."""
    names = list(family.experts)
    return names[::-1] if cfg.experts.train == "low" else names


def load_pipeline(
    cfg: GeneratorConfig,
    folder: Path,
    family: Family,
    *,
    device: torch.device,
    transformer_only: bool,
) -> WanPipeline:
    """Read the stock pipeline, every weight of it, and freeze all but what is trained.

    A transformer that waits in the host's memory is not put on the device.
    """
    # `WanPipeline.from_pretrained` would fill missing weights with random numbers.
    dtype = getattr(torch, cfg.dtype)
    parts: dict[str, Any] = {}
    trained, *others = trained_first(cfg, family)
    parts[trained] = read_transformer(cfg, family, folder / trained, device=device)
    place = torch.device("cpu") if cfg.experts.offload else device
    for other in others:
        # None leaves a part out
        parts[other] = None
        if not transformer_only:
            frozen = read_transformer(cfg, family, folder / other, device=place)
            parts[other] = frozen.requires_grad_(requires_grad=False).eval()
    if transformer_only:
        parts |= {"vae": None, "text_encoder": None, "tokenizer": None}
    else:
        from transformers import UMT5EncoderModel

        # The VAE has a dtype of its own, whatever the transformer's is.
        parts["vae"] = load_pretrained(
            AutoencoderKLWan,
            folder / "vae",
            dtype=getattr(torch, cfg.vae_dtype),
            device=device,
        )
        if cfg.vae_channels_last:
            store_channels_last(parts["vae"])
        parts["text_encoder"] = load_pretrained(
            UMT5EncoderModel,
            folder / "text_encoder",
            dtype=dtype,
            device=device,
        )

        if family.image == "channels+clip":
            from transformers import CLIPVisionModel

            parts["image_encoder"] = load_pretrained(
                CLIPVisionModel,
                folder / "image_encoder",
                dtype=dtype,
                device=device,
            )

    # Tokenizer, scheduler and the processor of images have no weights.
    unweighted = ["scheduler"]
    if transformer_only:
        parts |= {"image_encoder": None, "image_processor": None}
    else:
        unweighted.append("tokenizer")
        if family.image == "channels+clip":
            unweighted.append("image_processor")
    if not family.needs_image:
        for part in ("image_encoder", "image_processor"):
            parts.pop(part, None)
    for part in unweighted:
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part}: no such folder; a Wan has it")
        require_whole_folder(folder / part)
    pipeline_class = WanImageToVideoPipeline if family.needs_image else WanPipeline
    with errors_of(folder, family.pipeline):
        if family.flow_map:
            pipeline = _flow_map_pipeline(folder, parts)
        else:
            pipeline = pipeline_class.from_pretrained(folder, **parts)
    if not transformer_only:
        require_vocabulary(pipeline, folder)
    pipeline.set_progress_bar_config(disable=True)
    # Only the transformer is trained.
    encoder = getattr(pipeline, "image_encoder", None)
    for frozen in (pipeline.vae, pipeline.text_encoder, encoder):
        if frozen is not None:
            frozen.requires_grad_(requires_grad=False).eval()
    return pipeline


def _flow_map_pipeline(folder: Path, parts: dict[str, Any]) -> AnyFlowPipeline:
    """Put an AnyFlow together: the index of its publication names classes of other code."""
    from transformers import AutoTokenizer

    parts = dict(parts)
    if "tokenizer" not in parts:
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
    parts["scheduler"] = FlowMapEulerDiscreteScheduler.from_pretrained(
        folder / "scheduler"
    )
    return AnyFlowPipeline(**parts)


def read_transformer(
    cfg: GeneratorConfig, family: Family, folder: Path, *, device: torch.device
) -> WanTransformer3DModel:
    """Read a transformer in the config's dtype; a weight that is missing or not finite raises."""
    if family.flow_map:
        model = load_pretrained(
            AnyFlowTransformer3DModel,
            folder,
            dtype=getattr(torch, cfg.dtype),
            device=device,
            kinds=FLOW_MAPS,
        )
        return in_fp32(model)
    return load_pretrained(
        WanTransformer3DModel,
        folder,
        dtype=getattr(torch, cfg.dtype),
        device=device,
    )


def image_pipeline(pipeline: WanPipeline) -> WanImageToVideoPipeline:
    """The pipeline for videos of images, of the parts of a TI2V's pipeline for texts."""
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    parts = {name: getattr(pipeline, name) for name in names}
    images = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    images.set_progress_bar_config(disable=True)
    return images


def with_tokens(
    pipeline: WanImageToVideoPipeline, tokens_BLD: Tensor
) -> WanImageToVideoPipeline:
    """The same pipeline, which finds these tokens of its image instead of computing them.

    Its call takes either an image or tokens, and needs both; its encoder may have been freed.
    """
    same = copy.copy(pipeline)
    same.encode_image = lambda *_, **__: tokens_BLD
    return same


def require_vocabulary(pipeline: WanPipeline, folder: Path) -> None:
    """Raise ValueError for a tokenizer with more tokens than the text encoder has rows."""
    tokens = len(pipeline.tokenizer)
    rows = pipeline.text_encoder.config.vocab_size
    if tokens > rows:
        raise ValueError(
            f"{folder / 'tokenizer'} has {tokens} tokens, but the text encoder has {rows}: it is "
            "the tokenizer of another model"
        )
