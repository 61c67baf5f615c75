"""Twenty sound runs of the embedded world, none of which a diagnosis may accuse."""

from __future__ import annotations

_SAME = (
    "generator.sampler.num_steps=8",
    "grpo.group_size=8",
    "optimizer.lr=2e-3",
    "generator.lora.rank=32",
    "generator.lora.alpha=32",
    "generator.lora.targets=[to_q,to_k,to_v]",
)
_RANGE = "generator.sampler.stochastic_range"
# Words of launch/grpo.py on top of the recipe.
CLEAN: dict[str, tuple[str, ...]] = {
    "seed-1": ("seed=1",),
    "seed-2": ("seed=2",),
    "seed-3": ("seed=3", "prompts_per_step=8"),
    "seed-4": ("seed=4", "grpo.group_size=4", "prompts_per_step=8"),
    "seed-5": ("seed=5", "zero_stage=2"),
    "flow_grpo": ("--config", "configs/sisters/flow_grpo.yaml", *_SAME, f"{_RANGE}=8"),
    "mixgrpo": ("--config", "configs/sisters/mixgrpo.yaml", *_SAME, f"{_RANGE}=8"),
    "flash_grpo": (
        "--config",
        "configs/sisters/flash_grpo.yaml",
        *_SAME,
        f"{_RANGE}=4",
    ),
    "flow_cps": ("--config", "configs/sisters/flow_cps.yaml"),
    "mixgrpo-as-it-stands": (
        "--config",
        "configs/sisters/mixgrpo.yaml",
        "generator.sampler.num_steps=8",
        f"{_RANGE}=8",
    ),
    "longer": ("generator.num_frames=9",),
    "larger": ("generator.height=48", "generator.width=48"),
    "brightness": ("rewards.oracle=null", "rewards.brightness={}"),
    "motion": (
        "rewards.oracle=null",
        "rewards.dynamics={}",
        "rewards.smoothness={weight: 0.5}",
    ),
    "two-rewards": ("rewards.brightness={weight: 0}", "rewards.dynamics={weight: 0.5}"),
    "guided": ("generator.sampler.guidance_scale=2.0",),
    "without-kl": ("grpo.kl_weight=0", "grpo.scale=group"),
    "fast-tail": (
        "generator.sampler.tail_steps=3",
        "generator.sampler.tail_solver=ab2",
        "generator.sampler.merge_adapter=true",
    ),
    "two-updates": (
        "grpo.updates=2",
        "grpo.ratio=plain",
        "grpo.clip_low=0.2",
        "grpo.clip_high=0.2",
    ),
    "half-precision": ("generator.dtype=bfloat16", "cache_prompts=true"),
    # And two more.
    "two-ranks": (),
    "whole-transformer": ("generator.lora=null", "optimizer.lr=1e-4"),
}
