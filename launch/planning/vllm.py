"""What a vLLM process beside a run needs, and how long it generates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launch.planning.models import sizes_of

if TYPE_CHECKING:
    from launch.planning.meter import Cost
    from launch.planning.models import Lengths, MetaRewardModel
    from launch.planning.plan import Plan
    from rm.config import Generation

# The most sequences that run together; vLLM's default on a GPU of 80 GB is no smaller.
SEQUENCES = 256
# vLLM keeps weights, keys and values in bf16.
BF16 = 2.0


def cache_bytes(text_config: Any, tokens: float) -> float:
    """Bytes of the keys and values of ``tokens`` places.

    2 tensors x layers x heads of keys and values x size of a head x 2 bytes for each place.
    """
    heads = text_config.num_key_value_heads * text_config.head_dim
    return 2.0 * text_config.num_hidden_layers * heads * BF16 * tokens


@dataclass(frozen=True)
class VllmShare:
    """What vLLM has of a GPU.

    videos  whose chains of thought run together
    bytes   of its weights and of the caches of these chains of thought
    """

    videos: int
    bytes: float


def share_of(
    free: float,
    model: MetaRewardModel,
    lengths: Lengths,
    *,
    videos: int,
    copies: int,
) -> VllmShare:
    """Give vLLM as many of ``videos`` as their caches fit in ``free`` bytes, at least one.

    The ``copies`` chains of thought of a video share the cache of its prompt.
    """
    # What a video takes, and how many fit beside the weights.
    text_config = model.model.backbone.config.get_text_config()
    weights = BF16 * sizes_of(model.model).parameters
    places = lengths.prefix + copies * lengths.chain
    of_video = cache_bytes(text_config, places)
    fitting = int((free - weights) // of_video)
    running = max(1, min(videos, SEQUENCES // copies, fitting))
    return VllmShare(running, weights + running * of_video)


def add_vllm(
    plan: Plan,
    name: str,
    model: MetaRewardModel,
    lengths: Lengths,
    how: Generation,
    *,
    videos: int,
    copies: int,
    sleeps: bool,
) -> None:
    """Add vLLM's ``copies`` chains of thought for each of ``videos``, and its memory.

    Its kernels read the same weights and caches as the built-in engine's. If it ``sleeps``, its
    memory is free while it does not generate. Call this when all that is permanent has been added.
    """
    # What the run leaves of the device.
    free = plan.where.device.memory - plan.permanent
    share = share_of(free, model, lengths, videos=videos, copies=copies)
    cost = model.write(share.videos, lengths, how=how, copies=copies)
    # What the call keeps is in vLLM's share.
    inside: Cost = replace(cost, peak=0.0)
    plan.phase(name, inside * (videos / share.videos))
    plan.add(f"{name}: vLLM", share.bytes, temporary=sleeps)
    # What the numbers leave out.
    plan.facts.append(
        f"vLLM generates {share.videos * copies} chains of thought together; "
        "its start and the copying of weights are not counted"
    )
