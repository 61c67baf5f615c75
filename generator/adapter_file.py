"""A saved adapter without its model: read and checked, under ComfyUI's names, or merged into a transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.lora import both_sides
from generator.adapter import ADAPTER_FILE

_PREFIX = "transformer."  # the pipeline component that the weights belong to
_OTHER_LORAS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")

# names of a linear in diffusers and in Wan's own code, which ComfyUI keeps, inside blocks.N and outside
_IN_BLOCK = {
    f"{ours}.{linear}": f"{theirs}.{letter}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for linear, letter in (
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "o"),
    )
} | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


@dataclass(frozen=True)
class LoraMatrices:
    """What LoRA adds to a weight (O, I), but for the scaling: B A."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_OR.shape[0], self.a_RI.shape[1]


@dataclass(frozen=True)
class StoredAdapter:
    """W + (alpha / rank) B A for each linear of ``pairs``, by its name in diffusers' transformer."""

    source: Path
    rank: int
    alpha: float
    pairs: Mapping[str, LoraMatrices]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Merged:
    """Weights with an adapter in them.

    lost  of the change, what the weights' dtype rounds away: |merged - (W + change)| / |change|, norms over all linears
    """

    state: dict[str, Tensor]
    lost: float


def read(folder: Path) -> StoredAdapter:
    """What `generator.adapter.save` wrote. ValueError, naming the file and the key, for anything else: a lone A or B, a
    rank that is not the file's own, or a file that does not say its alpha.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / ADAPTER_FILE
    try:
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            tensors = {name: stored.get_tensor(name) for name in names}
            settings = json.loads(
                (stored.metadata() or {}).get("lora_adapter_metadata", "{}")
            )
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    rank, alpha = (settings.get(_PREFIX + key) for key in ("r", "lora_alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(
            f"{file} says neither rank nor alpha in its metadata: nobody knows how to scale it"
        )
    if other := [key for key in _OTHER_LORAS if settings.get(_PREFIX + key)]:
        raise ValueError(f"{file}: {other[0]} is not of this project's LoRA")
    found = []
    for name, tensor in tensors.items():
        linear, _, end = name.removeprefix(_PREFIX).rpartition(".lora_")
        if (
            not name.startswith(_PREFIX)
            or end not in ("A.weight", "B.weight")
            or tensor.dim() != 2
        ):
            raise ValueError(f"{file}: {name} is not the A or B of a linear's LoRA")
        found.append((linear, end[0], tensor))
    sides = both_sides(found, rank=rank, source=file)
    pairs = {
        linear: LoraMatrices(own["A"], own["B"])
        for linear, own in sorted(sides.items())
    }
    return StoredAdapter(file, rank, float(alpha), pairs)


def require_fit(adapter: StoredAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless every linear of the adapter is one of the transformer, whose weights have these shapes."""
    problems = []
    for linear, pair in adapter.pairs.items():
        want = shapes.get(f"{linear}.weight")
        if want is None:
            problems.append(f"there is no {linear}")
        elif want != pair.shape:
            problems.append(f"{linear} is {want}, its LoRA {pair.shape}")
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(
            f"{adapter.source} does not fit the transformer ({len(problems)} problems): {shown}"
        )


def comfyui(adapter: StoredAdapter) -> dict[str, Tensor]:
    """The adapter under the names of Wan's own code: `diffusion_model.blocks.0.self_attn.q.lora_A.weight` and so on.

    Readers scale by alpha / rank where a linear has an `.alpha`, and by 1 where it has none. In the blocks it has one
    and A and B are as trained. Outside them B is multiplied instead, since diffusers' reader of this layout refuses an
    alpha there. The file must carry no metadata of an adapter: diffusers would scale a second time by it.

    ValueError for a linear that has no name there.
    """
    out = {}
    for linear, pair in adapter.pairs.items():
        name, in_block = (
            f"diffusion_model.{original_name(linear)}",
            linear.startswith("blocks."),
        )
        out[f"{name}.lora_A.weight"] = pair.a_RI.contiguous()
        out[f"{name}.lora_B.weight"] = (
            pair.b_OR if in_block else pair.b_OR * adapter.scaling
        ).contiguous()
        if in_block:
            out[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
    return out


def original_name(linear: str) -> str:
    """The name in Wan's own code of a linear of diffusers' transformer. ValueError for one it does not have."""
    if linear in _OUTSIDE:
        return _OUTSIDE[linear]
    parts = linear.split(".", 2)
    if (
        len(parts) == 3
        and parts[0] == "blocks"
        and parts[1].isdigit()
        and parts[2] in _IN_BLOCK
    ):
        return f"blocks.{parts[1]}.{_IN_BLOCK[parts[2]]}"
    raise ValueError(f"{linear} has no name in Wan's own code")


@torch.no_grad()
def merge(base: Mapping[str, Tensor], adapter: StoredAdapter) -> Merged:
    """W + (alpha / rank) B A, computed in fp32 and stored in W's dtype; other weights as they are.

    ValueError when the adapter is another model's.
    """
    require_fit(adapter, {name: tuple(weight.shape) for name, weight in base.items()})
    state, lost, change = dict(base), 0.0, 0.0
    for linear, pair in adapter.pairs.items():
        name = f"{linear}.weight"
        change_OI = adapter.scaling * (pair.b_OR.float() @ pair.a_RI.float())
        want_OI = base[name].float() + change_OI
        state[name] = want_OI.to(base[name].dtype)
        lost += float((state[name].float() - want_OI).double().square().sum())
        change += float(change_OI.double().square().sum())
    return Merged(state, (lost / change) ** 0.5 if change else 0.0)
