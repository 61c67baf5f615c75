"""Checks of a config for a model with two transformers, from the folder's JSON files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from generator.denoiser import place_at
from generator.flow_map import check_flow_map
from generator.schedule import sigma_grid

if TYPE_CHECKING:
    from generator.config import GeneratorConfig, SamplerConfig
    from generator.family import Family

NAMES = ("high", "low")


def check_sampling(cfg: GeneratorConfig, family: Family) -> None:
    """Raise ValueError for settings of two transformers, or of a flow map, where there is none."""
    check_flow_map(cfg, family)
    # A model with two transformers takes them all.
    if family.boundary is not None:
        return
    if cfg.experts.train == "low":
        raise ValueError(
            f"generator.experts.train=low needs a model with two transformers, and {cfg.path} has "
            "one; leave the key out"
        )
    if cfg.sampler.guidance_scale_2 is not None:
        raise ValueError(
            f"generator.sampler.guidance_scale_2={cfg.sampler.guidance_scale_2:g} is of a model "
            f"with two transformers, and {cfg.path} has one; set guidance_scale"
        )


def check_training(cfg: GeneratorConfig, family: Family, *, zero_stage: int) -> None:
    """Raise ValueError for what a model with two transformers cannot be trained with.

    Only an adapter on one transformer is trained, with whole weights on every rank.
    """
    check_sampling(cfg, family)
    if family.image == "channels+clip" and cfg.context_parallel > 1:
        raise ValueError(
            f"generator.context_parallel={cfg.context_parallel} must be 1 for {cfg.path}: ranks "
            "cannot share the tokens of an image (CLIP)"
        )
    if family.boundary is None:
        return
    # All weights of one transformer would be a model of its own.
    if cfg.lora is None:
        raise ValueError(
            f"generator.lora=null would train all weights of a part of {cfg.path}, which has two "
            "transformers: give it an adapter"
        )
    # Which of the two a rank calls depends on its step.
    if zero_stage == 3:
        raise ValueError(
            f"zero_stage=3 splits weights that must be called equally often on all ranks, and "
            f"{cfg.path} has two transformers: use zero_stage 1 or 2"
        )


def check_stochastic_steps(cfg: GeneratorConfig, family: Family) -> None:
    """Raise ValueError if a stochastic step may fall to the transformer that is not trained."""
    if family.boundary is None:
        return
    how = cfg.sampler
    # Without one, an objective trains noise levels of both.
    if how.stochastic == "none":
        raise ValueError(
            f"generator.sampler.stochastic=none is for objectives that train all noise levels, and "
            f"{cfg.path} has two transformers, of which one is trained: use another stochastic"
        )
    # The steps before ``high`` belong to the one, the rest to the other.
    high = high_steps(how, family.boundary)
    if cfg.experts.train == "high" and how.stochastic_range > high:
        raise ValueError(
            f"generator.sampler.stochastic_range={how.stochastic_range} must be at most {high}: "
            f"with shift={how.shift:g} and num_steps={how.num_steps} the steps from {high} on "
            "belong to the transformer for low noise, which is not trained"
        )
    if cfg.experts.train == "low" and how.stochastic_first < high:
        raise ValueError(
            f"generator.sampler.stochastic_first={how.stochastic_first} must be at least {high} "
            f"with experts.train=low: with shift={how.shift:g} and num_steps={how.num_steps} the "
            "steps before it belong to the transformer for high noise, which is not trained"
        )


def high_steps(how: SamplerConfig, boundary: float) -> int:
    """Count the steps of the grid whose velocity is that of the transformer for high noise."""
    # A step belongs to the noise level that it starts from.
    sigmas = sigma_grid(how.num_steps, shift=how.shift).tolist()
    return sum(place_at(sigma, boundary) == 0 for sigma in sigmas[:-1])
