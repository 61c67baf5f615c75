"""Attach, save and load the LoRA adapter of the Wan transformer.

peft computes the adapter; the file has diffusers' format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.files import give_usual_mode, sort_header
from common.lora import adapter_layers, stock_name
from common.state_dicts import raise_problems, shapes_in, state_dict_problems
from generator.adapter_file import ADAPTER_FILE, require_fit

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel
    from torch import Tensor

    from generator.adapter_file import StoredAdapter
    from generator.config import LoraConfig


class CastLinear(torch.nn.Linear):
    """A linear layer whose product runs in another dtype than its weight's.

    Gradients reach the weight through the cast, in the weight's dtype.
    """

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        # the same parameter, so that optimizers and files see no difference
        self.weight = linear.weight
        self.compute_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O) in the compute dtype."""
        weight_OI = self.weight.to(self.compute_dtype)
        return torch.nn.functional.linear(x.to(self.compute_dtype), weight_OI)


def cast_products(model: PeftModel, dtype: torch.dtype) -> None:
    """Run the products of every adapter in ``dtype``; the adapter's weights keep theirs."""
    for layer in adapter_layers(model):
        for matrices in (layer.lora_A, layer.lora_B):
            for name, linear in matrices.items():
                matrices[name] = CastLinear(linear, dtype)
        # peft would widen the activations to the dtype of A first
        layer.cast_input_dtype_enabled = False


def attach(
    transformer: WanTransformer3DModel,
    lora: LoraConfig,
    *,
    seed: int,
) -> PeftModel:
    """Freeze the transformer and put fp32 LoRA adapters on its linear layers.

    B is zero, so the output does not change yet. A is drawn from ``seed``, so that all ranks start
    from the same adapter. Suffixes name layers of the blocks. Raises ValueError when a target
    matches no linear layer.
    """
    import peft

    # peft ignores a misspelt target as long as another matches, and would train a part of the model
    linears = [
        f".{name}"
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    unmatched = [
        target
        for target in lora.targets
        if not any(name.endswith(f".{target}") for name in linears)
    ]
    if unmatched:
        raise ValueError(
            f"LoraConfig.targets {unmatched} match no linear layer of the transformer"
        )
    targets = _in_blocks(linears, lora.targets)
    # The adapter's settings.
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        # a dropped unit would make the replayed log-prob differ from the sampled one
        lora_dropout=0.0,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    transformer.requires_grad_(requires_grad=False)
    # peft makes adapters over half-precision layers fp32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(transformer, config)
    # Training in half precision would lose small updates.
    dtypes = {
        parameter.dtype for parameter in model.parameters() if parameter.requires_grad
    }
    if dtypes != {torch.float32}:
        raise RuntimeError(f"expected fp32 adapter weights to train, got {dtypes}")
    # Their products may run in half precision.
    if lora.compute_dtype != "float32":
        cast_products(model, getattr(torch, lora.compute_dtype))
    return model


def _in_blocks(linears: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Keep targets to the blocks where their suffixes match layers before the blocks too.

    A Wan 2.1 I2V embeds CLIP's tokens by a feed-forward whose layers have the names of a block's.
    Targets that are outside of the blocks on purpose are named in full.

    linears  names of all linear layers, with a dot in front
    """
    wanted: dict[str, None] = {}
    clash = False
    for target in targets:
        matched = [name for name in linears if name.endswith(f".{target}")]
        inside = [name for name in matched if name.startswith(".blocks.")]
        # A name in full, or of layers that are nowhere else, is meant as it stands.
        chosen = inside if inside and f".{target}" not in matched else matched
        clash = clash or len(chosen) < len(matched)
        wanted |= dict.fromkeys(name.removeprefix(".") for name in chosen)
    return list(wanted) if clash else list(targets)


def attach_stored(
    transformer: WanTransformer3DModel, stored: StoredAdapter, *, device: torch.device
) -> PeftModel:
    """Put a saved adapter on a transformer that is not trained; its weights are on ``device``.

    A transformer that has an adapter gets the saved one instead. Raises ValueError when the adapter
    belongs to another model.
    """
    from generator.config import LoraConfig

    _detach(transformer)
    require_fit(stored, shapes_in(dict(transformer.named_parameters())))
    lora = LoraConfig(
        rank=stored.scales.rank,
        alpha=stored.scales.alpha,
        targets=tuple(stored.pairs),
    )
    model = attach(transformer, lora, seed=0)
    load(model, stored)
    # the base may wait in the host's memory
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(device)
            parameter.requires_grad_(requires_grad=False)
    return model.eval()


def _detach(transformer: WanTransformer3DModel) -> None:
    """Put the linear layers of a transformer back where an adapter wraps them."""
    # a list, since modules are replaced
    for name, layer in list(transformer.named_modules()):
        if hasattr(layer, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, layer.base_layer)


def save(
    model: PeftModel,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter as a file that stock `WanPipeline.load_lora_weights(folder)` reads.

    The file's metadata holds rank and alpha: without them a reader takes alpha to be the rank, and
    scales the output wrongly. Weights are stored in fp32. ``state_dict`` replaces the state of the
    model (gathered from its shards); the adapter's entries suffice. Returns the file's path.
    """
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    if state_dict is not None:
        state_dict = dict(state_dict)
    # diffusers' names, in fp32.
    layers = {}
    for name, weight in get_peft_model_state_dict(model, state_dict=state_dict).items():
        layers[stock_name(name)] = weight.detach().float().cpu().contiguous()
    config = model.peft_config["default"]
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
        },
    )
    # equal adapters shall be equal files
    sort_header(Path(folder) / ADAPTER_FILE)
    give_usual_mode(Path(folder) / ADAPTER_FILE)
    return Path(folder) / ADAPTER_FILE


def load(model: PeftModel, stored: StoredAdapter) -> None:
    """Copy a saved adapter's weights into the attached adapter, in place.

    Where the file scales a layer otherwise (rank-stabilised LoRA, alphas of single layers), B is
    multiplied, so that the layer changes as the file says. Call it before an optimizer takes its
    fp32 copies of the weights. Raises ValueError when names or shapes differ, or when rank or alpha
    of the file differ from this adapter's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # Rank and alpha.
    problems = []
    config = model.peft_config["default"]
    scales = stored.scales
    for key, value, want in (
        ("r", scales.rank, config.r),
        ("lora_alpha", scales.alpha, config.lora_alpha),
    ):
        if value != want:
            problems.append(f"{key} is {value}, want {want}")

    # Names and shapes.
    attached = get_peft_model_state_dict(model)
    tensors = {}
    for linear, pair in stored.pairs.items():
        tensors[f"{linear}.lora_A.weight"] = pair.a_RI
        ratio = pair.scaling / (config.lora_alpha / config.r)
        tensors[f"{linear}.lora_B.weight"] = ratio * pair.b_OR.float()
    wanted = {stock_name(name): weight for name, weight in attached.items()}
    problems += state_dict_problems(shapes_in(tensors), shapes_in(wanted))
    raise_problems(
        problems,
        f"{stored.source} does not fit generator.lora and the generator",
    )
    renamed = {name: tensors[stock_name(name)] for name in attached}
    set_peft_model_state_dict(model, renamed)
