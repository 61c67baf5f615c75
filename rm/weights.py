"""Weights that others saved: safetensors, a pickle if the user allows one, LoRA beside its linears, wrappers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.low_rank import both_sides

LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to a weight (O, I): scaling * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    def change(self) -> Tensor:
        return self.scaling * (self.b_OR.float() @ self.a_RI.float())


def low_ranks(tensors: Mapping[str, Tensor], *, rank: int, alpha: float, source: Path) -> dict[str, LowRank]:
    """Stock name of a weight -> what LoRA adds to it; the scaling is alpha / rank.

    ValueError, naming ``source``, for a tensor that is no A or B of a linear, a lone side, or another rank.
    """
    found = []
    for key, tensor in tensors.items():
        if (match := LORA_NAME.fullmatch(key)) is None:
            raise ValueError(f"{source}: {key} is not the A or B of a linear's LoRA")
        found.append((f"{stock_name(match[1])}.weight", match[2], tensor))
    sides = both_sides(found, rank=rank, source=source)
    return {name: LowRank(own["A"], own["B"], alpha / rank) for name, own in sides.items()}


def stock_name(key: str) -> str:
    """Without what wrappers put into a name: peft, DDP, FSDP."""
    for prefix in ("module.", "_fsdp_wrapped_module.", "base_model.model."):
        key = key.removeprefix(prefix)
    return key.replace(".base_layer.", ".")


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
        raise ValueError(f"{file} is not a file of tensors only, saved by torch: {error}") from error


def exactly(kind: Any, config: Any, state: dict[str, Tensor], *, dtype: str, source: Path) -> Any:
    """A transformers model of this class with exactly these weights: none missing, none left over, or ValueError."""
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = [f"{name} is {tuple(has)}, not {tuple(want)}" for name, has, want in report["mismatched_keys"]]
    problems = {"missing": report["missing_keys"], "unknown": report["unexpected_keys"], "of another size": wrong}
    if any(problems.values()):
        raise ValueError(f"{source}: weights do not fit config.json: {_some(problems)}")
    return model


def _some(problems: Mapping[str, Iterable[str]]) -> str:
    texts = {kind: sorted(names) for kind, names in problems.items() if names}
    return "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in texts.items())
