"""Read weights that other programs saved, and check that they fit a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.lora import LowRank
from common.state_dicts import (
    Shapes,
    raise_problems,
    shapes_in,
    state_dict_problems,
)
from common.strict_loading import require_finite
from common.weight_files import load_safetensors


def load_tensor_file(file: Path, *, allow_pickle: bool) -> Any:
    """Read a .safetensors or, if allowed, the containers of tensors that torch.save wrote.

    FileNotFoundError if it is missing. ValueError for a pickle that is not allowed, or that
    refers to anything but tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        return load_safetensors(file)
    if not allow_pickle:
        raise ValueError(
            f"{file} is a pickle, a format that can run code when it is read. Give the weights "
            "as .safetensors, or, if you trust their source, --allow-pickle, which reads tensors "
            "only"
        )
    # Refuse anything but tensors before the pickle is read.
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if unsafe:
            raise ValueError(f"it refers to {', '.join(sorted(unsafe))}")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{file} must hold nothing but tensors, saved by torch: {error}"
        ) from error


def merge_lora(
    state: dict[str, Tensor], lora: Mapping[str, LowRank], *, source: Path
) -> None:
    """Add LoRA's changes to the weights in place: W + scaling * B A, in fp32.

    ValueError, naming ``source``, if a change has no weight or another shape.
    """
    # Every trained matrix must be used.
    missing = sorted(set(lora) - set(state))
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} LoRA layers have no weight, such as {missing[0]}"
        )
    for name, low_rank in lora.items():
        # Added in fp32, whatever the weight's dtype is.
        change = low_rank.change()
        if change.shape != state[name].shape:
            raise ValueError(
                f"{source}: {name} is {tuple(state[name].shape)}, "
                f"its LoRA is {tuple(change.shape)}"
            )
        state[name] = state[name].float() + change


def require_weights(
    shapes: Shapes,
    model_class: Any,
    config: Any,
    source: Path,
) -> None:
    """Check that weights have exactly the names and shapes of a transformers model, or ValueError.

    Takes no memory for the model. ``lm_head.weight`` may be missing where the config ties it.
    """
    # Shapes without numbers.
    with torch.device("meta"):
        wanted = shapes_in(model_class(config).state_dict())

    # A tied head may be left out.
    if config.tie_word_embeddings and "lm_head.weight" not in shapes:
        wanted.pop("lm_head.weight", None)
    problems = state_dict_problems(shapes, wanted)
    raise_problems(problems, f"{source}: the weights do not fit config.json")


def build_model(
    model_class: Any,
    config: Any,
    state: dict[str, Tensor],
    *,
    dtype: str,
    source: Path,
) -> Any:
    """Build a transformers model with exactly these weights. Errors as in `require_weights`."""
    # transformers only warns about missing weights, and draws them at random.
    require_weights(shapes_in(state), model_class, config, source)
    require_finite(state, source)
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype),
    )
