"""Context parallelism: ranks share the tokens of every sample, for long or large videos.

Ulysses (2309.14509), as diffusers implements it. Between attentions each of D ranks holds
L / D tokens of a sample; in self-attention it holds all L tokens of 1 / D of the heads. The
output is gathered, so that every rank has all of it, with the same bits.

The gradient of a sample is the SUM over its ranks: each has the part that flows through its
tokens. An engine that takes the mean over ranks must multiply the loss by D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import (
    apply_context_parallel,
    remove_context_parallel,
)

from common.distributed import rank, seeded_generator, world_size

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor, nn


def check_heads(config: Mapping[str, Any], ranks: int) -> None:
    """Raise ValueError if the ranks of a sample cannot share a transformer's attention heads."""
    heads = config["num_attention_heads"]
    if heads % ranks:
        raise ValueError(
            f"generator.context_parallel={ranks} must divide the transformer's {heads} "
            "attention heads"
        )


def check_tokens(
    latent_shape: Sequence[int], patch_size: Sequence[int], ranks: int
) -> None:
    """Raise ValueError if the ranks of a sample cannot share its tokens equally.

    latent_shape  (C, F, H, W) of one video
    """
    tokens = 1
    for size, patch in zip(latent_shape[1:], patch_size, strict=True):
        tokens *= size // patch
    if tokens % ranks:
        raise ValueError(
            f"generator.context_parallel={ranks} must divide the {tokens} tokens of a video "
            f"with latents {tuple(latent_shape)}"
        )


def join_ranks(ranks: int, device: torch.device) -> ParallelConfig | None:
    """Form a process group of every ``ranks`` consecutive ranks, all of which must call this.

    None for a single rank. Raises ValueError when ``ranks`` does not divide the number of ranks.
    """
    if ranks == 1:
        return None
    world = world_size()
    if world % ranks:
        raise ValueError(
            f"generator.context_parallel={ranks} must divide the {world} ranks"
        )
    # diffusers looks for dimensions of these names
    mesh = dist.device_mesh.init_device_mesh(
        device.type,
        (world // ranks, 1, ranks),
        mesh_dim_names=("data", "ring", "ulysses"),
    )
    parallel = ParallelConfig(
        context_parallel_config=ContextParallelConfig(ulysses_degree=ranks, mesh=mesh)
    )
    parallel.setup(rank(), world, device, mesh=mesh)
    return parallel


def share_tokens(
    transformer: WanTransformer3DModel, parallel: ParallelConfig | None
) -> None:
    """Let the ranks of a sample share its tokens in this transformer; None changes nothing.

    Not `transformer.enable_parallelism`, which needs an accelerator. Raises ValueError when the
    ranks cannot share the heads, or the attention backend cannot run on shared tokens.
    """
    if parallel is None:
        return
    context = parallel.context_parallel_config
    check_heads(transformer.config, context.ulysses_degree)
    check_backend(transformer)
    _set_parallel(transformer, parallel)
    apply_context_parallel(transformer, context, _plan(transformer))


def check_backend(transformer: WanTransformer3DModel) -> None:
    """Raise ValueError if the transformer's attention backend cannot run on shared tokens."""
    # private names of diffusers, which asks the same of its registry
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
    )

    able = _AttentionBackendRegistry._supports_context_parallel
    for processor in _processors(transformer):
        backend, _ = _AttentionBackendRegistry.get_active_backend()
        if processor._attention_backend is not None:
            backend = AttentionBackendName(processor._attention_backend)
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            raise ValueError(
                f"the attention backend {backend.value} cannot run with "
                f"generator.context_parallel; these can: {', '.join(sorted(able))}"
            )


@contextmanager
def alone(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Inside, this rank computes all tokens by itself, as without context parallelism."""
    parallel = next(_processors(transformer))._parallel_config
    if parallel is None:
        yield
        return
    # Take the hooks off, and put them on again.
    remove_context_parallel(transformer, _plan(transformer))
    _set_parallel(transformer, None)
    try:
        yield
    finally:
        share_tokens(transformer, parallel)


def gradient_gap(module: nn.Module, transformer: WanTransformer3DModel) -> float:
    """Compare the gradient over the ranks of a sample with that of this rank alone.

    |g_ranks - g_alone| / |g_alone|, where g is the gradient of the first block's trained weights
    for a tiny random latent, so that it has flowed back through every attention. It leaves no
    gradient behind. All ranks must call this. Raises ValueError without context parallelism.

    module  what is called: the transformer, or its wrapper with an adapter
    """
    parallel = next(_processors(transformer))._parallel_config
    if parallel is None:
        raise ValueError("gradient_gap compares nothing without context parallelism")

    # 1. Two tokens a rank, the same on all ranks of a sample.
    context = parallel.context_parallel_config
    patch = transformer.config.patch_size
    shape = (transformer.config.in_channels, patch[0], 2 * patch[1])
    inputs = _random_inputs(transformer, (*shape, patch[2] * context.ulysses_degree))
    weights = [p for p in transformer.blocks[0].parameters() if p.requires_grad]

    # 2. The gradient through this rank's tokens, summed over the ranks of the sample.
    shared = _gradient(module, inputs, weights)
    dist.all_reduce(shared, group=context._flattened_mesh.get_group())

    # 3. The gradient through all tokens.
    with alone(transformer):
        whole = _gradient(module, inputs, weights)
    return float((shared - whole).norm() / whole.norm())


def _random_inputs(
    transformer: WanTransformer3DModel, shape: Sequence[int]
) -> dict[str, Tensor]:
    """A random latent of this shape and a random prompt of 8 tokens, as forward takes them."""
    device = transformer.patch_embedding.weight.device
    dtype = transformer.patch_embedding.weight.dtype
    source = seeded_generator("context parallel")
    latent = torch.randn((1, *shape), generator=source)
    text = torch.randn((1, 8, transformer.config.text_dim), generator=source)
    return {
        "hidden_states": latent.to(device, dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": text.to(device, dtype),
    }


def _gradient(
    module: nn.Module, inputs: Mapping[str, Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Gradient of the mean square of the output, in a row, fp32."""
    out = module(**inputs, return_dict=False)[0]
    # not backward(): the engine would count it
    gradients = torch.autograd.grad(out.float().square().mean(), weights)
    return torch.cat([gradient.float().flatten() for gradient in gradients])


def _plan(transformer: WanTransformer3DModel) -> dict[str, Any]:
    """Where tokens are split and gathered, as diffusers knows it for this class."""
    # "" splits a time per token, where ours is a time per sample: it would only warn
    return {place: split for place, split in transformer._cp_plan.items() if place}


def _processors(transformer: WanTransformer3DModel) -> Iterator[Any]:
    """The attention processors of all blocks."""
    for block in transformer.blocks:
        yield block.attn1.processor
        yield block.attn2.processor


def _set_parallel(
    transformer: WanTransformer3DModel, parallel: ParallelConfig | None
) -> None:
    transformer._parallel_config = parallel
    for processor in _processors(transformer):
        processor._parallel_config = parallel
