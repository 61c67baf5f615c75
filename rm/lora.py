"""LoRA adapters on the language model of the reward model's backbone.

A bfloat16 weight near w moves in steps of about w / 256, and a LoRA's change is often smaller than
half a step: merging would round it away. So a bfloat16 checkpoint keeps its adapter apart, in
peft's files, and the loaded model applies it to the untouched weight. In fp32 merging loses
nothing that matters, and both saving and loading merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import read_json, write_json
from common.lora import LoraScales, LowRank, low_ranks
from common.strict_loading import require_finite
from common.weight_files import load_safetensors

if TYPE_CHECKING:
    from rm.config import BackboneLora

_LLM_LINEARS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)
# peft's names: transformers applies the adapter too where peft is installed.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# Settings of peft under which W + (alpha / r) B A would be wrong.
UNSUPPORTED_LORA = (
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


def add_lora(backbone: nn.Module, lora: BackboneLora) -> None:
    """Add LoRA to q, k, v, o, gate, up, down of every language layer, in place.

    The paths of the modules stay the same.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_LLM_LINEARS,
        bias="none",
    )
    peft.inject_adapter_in_model(config, backbone)


class AdaptedLinear(nn.Linear):
    """A linear layer with a frozen adapter: W x + scaling * B (A x).

    The operations are peft's, in its order and dtype, so that a loaded checkpoint computes what
    training computed to the last bit. A LoRA that is added later wraps the layer as a whole:
    switched off, it leaves the adapter on.
    """

    def __init__(self, linear: nn.Linear, pair: LowRank) -> None:
        # The weight is taken over, not copied.
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = pair.scaling
        self.adapter_A = _frozen_matrix(pair.a_RI, linear.weight)
        self.adapter_B = _frozen_matrix(pair.b_OR, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.adapter_A), self.adapter_B)
        return super().forward(x) + low * self.scaling


def _frozen_matrix(matrix: Tensor, like: Tensor) -> nn.Parameter:
    matrix = matrix.to(device=like.device, dtype=like.dtype)
    return nn.Parameter(matrix.contiguous(), requires_grad=False)


# ---------------------------------------------------------------------- saving


class BackboneState(NamedTuple):
    """The weights of a backbone under their stock names, and its adapter apart from them.

    The adapter maps the name of a weight to its change; it is empty without LoRA.
    """

    weights: dict[str, Tensor]
    adapter: dict[str, LowRank]


def split_state(backbone: nn.Module, state: Mapping[str, Tensor]) -> BackboneState:
    """Take a model's state, whose names start with "backbone.", apart.

    A layer that holds an adapter of a checkpoint and LoRA gets both as a single pair.
    """
    # Everything but the matrices of adapters.
    weights = {}
    for key, tensor in state.items():
        if key.startswith("backbone.") and not is_adapter(key):
            weights[_without_wrapper(key.removeprefix("backbone."))] = tensor

    # The adapter below comes first: the modules are in the order (LoRA, base layer).
    pairs: dict[str, list[LowRank]] = {}
    for name, module in backbone.named_modules():
        pair = None
        key = f"backbone.{name}"
        if isinstance(module, AdaptedLinear):
            sides = (state[f"{key}.adapter_A"], state[f"{key}.adapter_B"])
            pair = LowRank(*sides, module.scaling)
        elif f"{key}.lora_A.default.weight" in state:
            sides = [state[f"{key}.lora_{side}.default.weight"] for side in "AB"]
            pair = LowRank(*sides, module.scaling["default"])
        if pair is not None:
            pairs.setdefault(f"{_without_wrapper(name)}.weight", []).append(pair)
    return BackboneState(weights, {name: _joined(both) for name, both in pairs.items()})


def is_adapter(name: str) -> bool:
    """Return True for a matrix of a checkpoint's adapter or of LoRA."""
    return ".lora_" in name or ".adapter_" in name


def _without_wrapper(name: str) -> str:
    """Leave out peft's wrapper around a linear."""
    return name.replace(".base_layer", "")


def _joined(pairs: Sequence[LowRank]) -> LowRank:
    """Return the sum of changes as a single pair: their ranks add up."""
    if len(pairs) == 1:
        return pairs[0]
    a_RI = torch.cat([pair.a_RI.float() for pair in pairs])
    b_OR = torch.cat([pair.scaling * pair.b_OR.float() for pair in pairs], dim=1)
    return LowRank(a_RI, b_OR, 1.0)


def save_adapter(folder: Path, adapter: Mapping[str, LowRank]) -> None:
    """Write an adapter as peft does, its matrices in fp32; without layers, remove older files.

    Raises ValueError if layers differ in rank or scaling, which the file cannot say.
    """
    from safetensors.torch import save_file

    # An adapter of an earlier save would be applied to merged weights.
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        (folder / name).unlink(missing_ok=True)
    if not adapter:
        return
    kinds = {(len(pair.a_RI), pair.scaling) for pair in adapter.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"{folder}: the adapter's layers differ in (rank, scaling): {sorted(kinds)}"
        )
    rank, scaling = kinds.pop()
    tensors = {}
    for name, pair in adapter.items():
        layer = f"{_PEFT_PREFIX}{name.removesuffix('.weight')}"
        for side, matrix in (("A", pair.a_RI), ("B", pair.b_OR)):
            whole = matrix.detach().float().cpu().contiguous()
            tensors[f"{layer}.lora_{side}.weight"] = whole
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank * scaling,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(name.removesuffix(".weight") for name in adapter),
    }
    write_json(folder / ADAPTER_CONFIG, config)


# ---------------------------------------------------------------------- loading


def read_peft_adapter(
    folder: Path, *, alpha: float | None = None
) -> dict[str, LowRank]:
    """Read what an adapter in peft's files adds to each weight, by stock name.

    alpha  Replaces the file's; the scaling is alpha / r.

    Raises ValueError, naming the file, for another kind of LoRA, a wrong setting or matrices that
    do not belong together.
    """
    config_file = folder / ADAPTER_CONFIG
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object")
    # Another kind of LoRA would be applied wrongly.
    for key in UNSUPPORTED_LORA:
        if config.get(key):
            raise ValueError(
                f"{config_file}: {key}={config[key]!r} is not supported, only plain LoRA is"
            )
    if alpha is None:
        alpha = config.get("lora_alpha")
    rank = config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"{config_file}: lora_alpha={alpha!r} must be a number, r={rank!r} an integer above 0"
        )
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {ADAPTER_CONFIG} belongs to it")
    tensors = load_safetensors(file)
    require_finite(tensors, file)
    return low_ranks(tensors, LoraScales(rank, alpha), source=file)


@torch.no_grad()
def apply_adapter(
    backbone: nn.Module, adapter: Mapping[str, LowRank], source: Path
) -> None:
    """Put an adapter into a backbone: merged into fp32 weights, apart from other weights.

    Raises ValueError, naming ``source``, if a layer is missing or has another shape.
    """
    linears = {
        f"{name}.weight": module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, pair in adapter.items():
        linear = linears.get(name)
        if linear is None or linear.weight.shape != pair.shape:
            found = None if linear is None else tuple(linear.weight.shape)
            raise ValueError(
                f"{source}: {name} is to be changed as {pair.shape}, but the model has {found}"
            )
        if linear.weight.dtype == torch.float32:
            linear.weight.add_(pair.change())
        else:
            layer = name.removesuffix(".weight")
            backbone.set_submodule(layer, AdaptedLinear(linear, pair))
