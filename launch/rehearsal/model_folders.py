"""Folders of models without weights, and modules that are built from such folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import read_json, write_json
from common.shipped import shipped
from launch.planning import known_models
from launch.planning.models import PROMPT_TOKENS
from launch.rehearsal.repeats import repeat_calls

if TYPE_CHECKING:
    from torch import nn

    from launch.rehearsal.device import SimulatedGpu
    from rm.config import Generation, RewardDimension, VideoSettings

# Tokenizers, scheduler and the ids of special tokens; no weights of these are read.
_TINY_WAN = "assets/shapes/wan"
_TINY_QWEN = "assets/shapes/qwen"
# Tokens of the chat, the time stamps and the short prompt around the instruction.
CHAT_TOKENS = 56


def wan_folder(name: str, folder: Path) -> Path:
    """Write the configs of a published Wan, beside a tiny tokenizer, without weights."""
    from diffusers import (
        AnyFlowTransformer3DModel,
        AutoencoderKLWan,
        FlowMapEulerDiscreteScheduler,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config

    # Everything without a size is that of the embedded world.
    tiny = shipped(_TINY_WAN)
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(tiny / part, folder / part)
    index = read_json(tiny / "model_index.json") | known_models.wan_index(name)
    write_json(folder / "model_index.json", index)

    # A flow map has classes of its own.
    kind = WanTransformer3DModel
    if known_models.wan_family(name).flow_map:
        kind = AnyFlowTransformer3DModel
        FlowMapEulerDiscreteScheduler(shift=5.0).save_config(folder / "scheduler")

    # diffusers fills in what the published sizes leave to defaults.
    with torch.device("meta"):
        transformer = kind.from_config(known_models.WAN[name])
        vae = AutoencoderKLWan.from_config(known_models.wan_vae(name))
    for expert in known_models.wan_family(name).experts:
        transformer.save_config(folder / expert)
    vae.save_config(folder / "vae")
    text = UMT5Config(**known_models.UMT5_XXL, architectures=["UMT5EncoderModel"])
    text.save_pretrained(folder / "text_encoder")
    return folder


def qwen_folder(name: str, folder: Path) -> Path:
    """Write the config of a published Qwen3-VL, beside a tiny tokenizer, without weights.

    A name that is not published stands for the size that it contains.
    """
    from transformers import Qwen3VLConfig

    # Ids of special tokens are those of the tokenizer.
    tiny = shipped(_TINY_QWEN)
    small = read_json(tiny / "config.json")
    config = Qwen3VLConfig(
        **known_models.QWEN3_VL[known_models.closest_qwen3_vl(name)],
        architectures=small["architectures"],
        image_token_id=small["image_token_id"],
        video_token_id=small["video_token_id"],
    )
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder)
    # An instruction of the released length.
    words = text_of(tiny, PROMPT_TOKENS - CHAT_TOKENS)
    write_json(folder / "prompt.json", {"before": f"{{prompt}}{words}", "after": ""})
    return folder


def text_of(tokenizer_folder: Path, tokens: int) -> str:
    """Return a text of about so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder.as_posix())
    each = len(tokenizer(" word" * 100, add_special_tokens=False).input_ids) / 100
    return " word" * round(tokens / each)


def descore_folder(
    name: str,
    folder: Path,
    *,
    settings: VideoSettings | None = None,
    generation: Generation | None = None,
    dimensions: Mapping[str, RewardDimension] | None = None,
) -> Path:
    """Write a DeScore on a published Qwen3-VL: everything but the weights of the backbone."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    from rm.config import Generation, VideoSettings, one_reward
    from rm.model import DESCORE_FILE, HEAD_FILE, VIDEO_FILE

    # The backbone, and the released settings.
    qwen_folder(name, folder)
    (settings or VideoSettings()).save(folder / VIDEO_FILE)
    config = read_json(folder / "config.json")
    width = config["text_config"]["hidden_size"]

    # Query and head.
    dimensions = dimensions or one_reward()
    tensors = {}
    for key in ("query", "head"):
        tensors[key] = torch.zeros(len(dimensions), width)
    save_file(tensors, folder / HEAD_FILE)
    generation = generation or Generation(max_new_tokens=4096, repetition_penalty=1.05)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*vocabulary["model"]["vocab"].values()]
    ids += [token["id"] for token in vocabulary["added_tokens"]]
    record = {
        "format": 1,
        "query_id": max(ids) + 1,
        "generation": asdict(generation),
        "dimensions": {key: asdict(value) for key, value in dimensions.items()},
        "cot_in_training": "always",
    }
    write_json(folder / DESCORE_FILE, record)
    return folder


def shapes_only(gpu: SimulatedGpu) -> Any:
    """Return a stand-in for reading weights: modules have the shapes of their config.json.

    With numbers everywhere (``gpu.everything``) the weights are read and moved to the device.
    """
    from common import strict_loading

    read = strict_loading._read_weights

    def build(
        model_class: Any, folder: Path, device: torch.device | str, **options: Any
    ) -> nn.Module:
        if gpu.everything:
            return read(model_class, folder, "cpu", **options).to(device)
        dtype = options.get("dtype") or torch.float32
        # As the libraries do it: in the dtype from the start.
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = _from_config(model_class, folder)
        finally:
            torch.set_default_dtype(before)
        # diffusers keeps some modules in fp32.
        names = getattr(model, "_keep_in_fp32_modules", None) or ()
        in_fp32 = set(names) if model_class.__module__.startswith("diffusers.") else ()
        for name, parameter in model.named_parameters():
            wide = any(part in in_fp32 for part in name.split("."))
            parameter.data = parameter.data.to(torch.float32 if wide else dtype)
            gpu.twins.forget(parameter)
        repeat_calls(gpu, model)
        return model.eval()

    return build


def _from_config(model_class: Any, folder: Path) -> nn.Module:
    """Build a model of diffusers or transformers from the config in its folder."""
    if model_class.__module__.startswith("diffusers."):
        return model_class.from_config(model_class.load_config(folder.as_posix()))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.as_posix())
    return model_class._from_config(config)
