"""Weights that others saved: safetensors, a pickle if the user allows one, LoRA beside its linears, wrappers' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def open_safetensors(file: Path) -> Any:
    """A safetensors file, opened; ValueError with its name if it is cut short or another format."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """Everything in it. ValueError as above."""
    with open_safetensors(file) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118, not a mapping


def load_any(file: Path, *, allow_pickle: bool) -> Any:
    """A .safetensors; or, if allowed, whatever containers of tensors torch.save made a .pth of.

    FileNotFoundError; ValueError for a pickle that is not allowed, or that asks for anything but tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        return load_safetensors(file)
    if not allow_pickle:
        raise ValueError(
            f"{file} is a pickle, a format that can run code when read, so it is not; --allow-pickle reads it, "
            "tensors only, if you trust where it came from; or give it as .safetensors"
        )
    try:
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            raise ValueError(f"it asks for {', '.join(sorted(foreign))}")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not a file of tensors only, saved by torch: {error}"
        ) from error


def exactly(
    kind: Any, config: Any, state: dict[str, Tensor], *, dtype: str, source: Path
) -> Any:
    """A transformers model of this class with exactly these weights: none missing, none left over, or ValueError."""
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = [
        f"{name} is {tuple(has)}, not {tuple(want)}"
        for name, has, want in report["mismatched_keys"]
    ]
    problems = {
        "missing": report["missing_keys"],
        "unknown": report["unexpected_keys"],
        "of another size": wrong,
    }
    if any(problems.values()):
        raise ValueError(f"{source}: weights do not fit config.json: {_some(problems)}")
    return model


def _some(problems: Mapping[str, Iterable[str]]) -> str:
    texts = {kind: sorted(names) for kind, names in problems.items() if names}
    return "; ".join(
        f"{len(names)} {kind}, such as {names[0]}" for kind, names in texts.items()
    )
