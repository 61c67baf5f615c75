"""A flow map as denoiser: AnyFlow's transformer, which takes a second time.

    u(x, sigma, target)   mean velocity of the flow between the two noise levels, target <= sigma
    jump                  x_target = x - (sigma - target) u(x, sigma, target)
    v(x, sigma)           u(x, sigma, sigma), what a Wan predicts

AnyFlow (2605.13724) is a Wan 2.1 with a second embedder, for the time at the end of the jump.
Guidance is part of its weights, so a call is one forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import progress
from common.gaussian import widen
from generator.denoiser import Conditions, Denoiser

if TYPE_CHECKING:
    from diffusers import AnyFlowTransformer3DModel, WanTransformer3DModel
    from torch import Tensor, nn

    from generator.config import GeneratorConfig
    from generator.family import Family

# The shared names of the two embedders of time, inside `condition_embedder`.
_START = "condition_embedder.time_embedder."
_END = "condition_embedder.delta_embedder."
# Modules of the embedder that are kept in fp32, see `in_fp32`.
IN_FP32 = ("time_embedder", "delta_embedder", "time_proj")
# What only a Wan's config.json has; AnyFlow's attention is always the published Wan's.
_OF_WAN_ONLY = ("added_kv_proj_dim", "pos_embed_seq_len", "qk_norm")


class FlowMap(Denoiser):
    """Calls a transformer with two times; `Denoiser.velocity` is its diagonal."""

    def velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        conditions: Conditions,
        *,
        guidance_scale: float,
    ) -> Tensor:
        """v = u(x, sigma, sigma) -> (B, C, F, H, W), fp32 (fp64 for fp64 weights).

        Raises ValueError for a scale other than 1: guidance is part of the weights.
        """
        if guidance_scale != 1:
            raise ValueError(
                f"a flow map has its guidance in its weights, got scale {guidance_scale:g}"
            )
        return self.mean_velocity(x_BCFHW, sigma_B, sigma_B, conditions)

    def mean_velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        target_B: Tensor,
        conditions: Conditions,
    ) -> Tensor:
        """u(x, sigma, target) -> (B, C, F, H, W), fp32 (fp64 for fp64 weights)."""
        # The check is free, eval() on every submodule is not.
        expert = self.expert
        module = expert.module
        if module.training:
            module.eval()
        # One forward: guidance is in the weights.
        u_BCFHW = mean_velocity(
            module,
            x_BCFHW.to(self.device, expert.dtype),
            sigma_B.to(self.device),
            target_B.to(self.device),
            conditions.text_BLD,
        )
        progress.tick()
        return u_BCFHW


def mean_velocity(
    module: nn.Module,
    x_BCFHW: Tensor,
    sigma_B: Tensor,
    target_B: Tensor,
    text_BLD: Tensor,
) -> Tensor:
    """u(x, sigma, target) of AnyFlow's transformer -> (B, C, F, H, W), fp32 or better.

    It takes a time for every latent frame, and frames before channels.
    """
    # Times count from 0 to 1000, and need not be integers.
    frames = x_BCFHW.shape[2]
    time_BF = (1000 * sigma_B.float())[:, None].expand(-1, frames)
    target_BF = (1000 * target_B.float())[:, None].expand(-1, frames)
    # The first time is where x is, the second where the jump ends.
    out_BFCHW = module(
        hidden_states=x_BCFHW.transpose(1, 2),
        timestep=time_BF,
        r_timestep=target_BF,
        encoder_hidden_states=text_BLD,
        return_dict=False,
    )[0]
    return widen(out_BFCHW.transpose(1, 2))


def from_wan(
    transformer: WanTransformer3DModel, *, gate: float = 0.25
) -> AnyFlowTransformer3DModel:
    """Make a flow map whose diagonal is this Wan: AnyFlow's start of training.

    The embedder of the second time is a copy of the first one's, so that (1 - gate) e(t) +
    gate e(t) = e(t) where the times are equal. Weights are copied.
    """
    from diffusers import AnyFlowTransformer3DModel

    # 1. The same sizes.
    config = dict(transformer.config)
    kept = {}
    for key, value in config.items():
        if not key.startswith("_") and key not in _OF_WAN_ONLY:
            kept[key] = value
    model = AnyFlowTransformer3DModel(**kept, gate_value=gate, deltatime_type="r")

    # 2. The same weights, and one embedder twice.
    state = dict(transformer.state_dict())
    for name, weight in transformer.state_dict().items():
        if name.startswith(_START):
            state[name.replace(_START, _END)] = weight.clone()
    model.load_state_dict(state)
    return model.eval()


def in_fp32(model: AnyFlowTransformer3DModel) -> AnyFlowTransformer3DModel:
    """Put the embedders of both times into fp32, in place.

    diffusers keeps the first one in fp32 and lets the second go to half precision, though both
    read times up to 1000. Their mix is fp32 then, and so must be the layer that reads it.
    """
    for name in IN_FP32:
        getattr(model.condition_embedder, name).float()
    return model


def check_flow_map(cfg: GeneratorConfig, family: Family) -> None:
    """Raise ValueError for a sampler's setting that this kind of model does not have."""
    how = cfg.sampler
    if not family.flow_map:
        for key, value, off in (
            ("kernel", how.kernel == "anchor" and "anchor", False),
            ("prefix_steps", how.prefix_steps, None),
        ):
            if value is not off:
                raise ValueError(
                    f"generator.sampler.{key}={value} is of a flow map (AnyFlow), and {cfg.path} "
                    "is none; leave the key out"
                )
        return

    # Guidance was trained into the weights; the rest belongs to an ODE's solver.
    for key, value, only in (
        ("sampler.guidance_scale", how.guidance_scale, 1.0),
        ("sampler.guidance_scale_2", how.guidance_scale_2, None),
        ("sampler.tail_guidance", how.tail_guidance, None),
        ("sampler.negative_prompt", how.negative_prompt, ""),
        ("sampler.tail_solver", how.tail_solver, "euler"),
        ("sampler.tail_cache", how.tail_cache, 1),
        ("context_parallel", cfg.context_parallel, 1),
    ):
        if value != only:
            shown = "null" if only is None else repr(only)
            raise ValueError(
                f"generator.{key}={value} cannot be used with {cfg.path}: it is a flow map "
                f"(AnyFlow), with guidance in its weights and jumps for steps; set it to {shown}"
            )
