"""Twenty faults, planted by replacing functions in the process of a run; see `planted.py`.

The product has no option for any of them, except those that are settings.
"""

from __future__ import annotations

from typing import Any

from tests.launch.diagnosis.further_faults import FURTHER_FAULTS
from tests.launch.diagnosis.other_faults import OTHER_FAULTS
from tests.launch.diagnosis.planting import (
    PlantedFault,
    change_value,
    of_oracle,
    replace_in,
)


def gradients_stay_local() -> None:
    """Each rank keeps its own gradients: the reduction of ZeRO does nothing."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def average_tensor(self: Any, tensor: Any, *_: Any, **__: Any) -> None:
        """Do not reduce."""

    replace_in(DeepSpeedZeroOptimizer, "average_tensor", lambda _: average_tensor)


def sampler_without_adapter() -> None:
    from generator.wan import WanGenerator

    def make(rollout: Any) -> Any:
        def without(self: Any, *args: Any, **options: Any) -> Any:
            with self.reference():
                return rollout(self, *args, **options)

        return without

    replace_in(WanGenerator, "rollout", make)


def lora_b_reset() -> None:
    """lora_B is set back to zero after every optimizer step."""
    import torch

    from engine.skip_nonfinite import SkipNonFinite

    def make(step: Any) -> Any:
        def reset(self: Any) -> None:
            step(self)
            with torch.no_grad():
                for name, parameter in self.engine.module.named_parameters():
                    if "lora_B" in name:
                        parameter.zero_()

        return reset

    replace_in(SkipNonFinite, "step", make)


def adapter_frozen() -> None:
    """The optimizer's step changes nothing."""
    from torch.optim import AdamW

    from engine import optimizer

    for owner in (AdamW, optimizer.PerGroupClippedAdamW):
        owner.step = lambda self, closure=None: None


def prompts_swapped() -> None:
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        def swapped(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            return score(self, video, list(prompts)[::-1], fps=fps)

        return swapped

    replace_in(NamedReward, "score", make)


def reward_blind() -> None:
    fixed = "a vivid video: a red circle moves left in a dark room, fixed camera"
    of_oracle(lambda score, v, p, fps: score(v, [fixed] * len(p), fps))


def reward_negated() -> None:
    of_oracle(lambda score, v, p, fps: change_value(score(v, p, fps), lambda x: -x))


def reward_saturated() -> None:
    of_oracle(
        lambda score, v, p, fps: change_value(
            score(v, p, fps), lambda x: x.clamp(max=0.1)
        )
    )


def reward_swapped_inside() -> None:
    """The reward answers in another order than its videos."""
    of_oracle(
        lambda score, v, p, fps: change_value(score(v, p, fps), lambda x: x.roll(3))
    )


def half_nan() -> None:
    import torch

    def change(x: Any) -> Any:
        bad = torch.arange(len(x)) % 2 == 0
        return torch.where(bad, torch.full_like(x, float("nan")), x)

    of_oracle(lambda score, v, p, fps: change_value(score(v, p, fps), change))


def fps_of_another() -> None:
    from alignment.grpo import GrpoLoop

    def make(init: Any) -> Any:
        def wrong(self: Any, *args: Any, **options: Any) -> None:
            init(self, *args, **options)
            self.fps = 24.0

        return wrong

    replace_in(GrpoLoop, "__init__", make)


def guidance_left_out() -> None:
    from generator.wan import WanGenerator

    def make(transition: Any) -> Any:
        def unguided(self: Any, prompt: str, step: Any) -> Any:
            import torch

            x = step.latent_MCFHW.to(self.device)
            sigma = torch.full((len(x),), step.sigma)
            v = self.velocity(x, sigma, [prompt] * len(x), guidance_scale=1.0)
            return self.kernel.transition(x, v, step.sigma, step.sigma_next)

        return unguided

    replace_in(WanGenerator, "transition", make)


def log_prob_in_half() -> None:
    import torch

    from common import gaussian

    def make(log_prob: Any) -> Any:
        def half(p: Any, x: Any) -> Any:
            rounded = gaussian.Gaussian(p.mean.to(torch.bfloat16), p.std)
            return log_prob(rounded, x.to(torch.bfloat16))

        return half

    replace_in(gaussian, "log_prob", make)


def latents_not_scaled() -> None:
    import torch

    from generator.latents import LatentCodec

    def plain(self: Any, device: Any) -> Any:
        count = len(self.vae.config.latents_mean)
        shape = (1, count, 1, 1, 1)
        return torch.zeros(shape, device=device), torch.ones(shape, device=device)

    replace_in(LatentCodec, "_mean_and_std", lambda _: plain)


def embeddings_mixed_up() -> None:
    """Every prompt gets the embedding of the prompt that was encoded before it."""
    from generator.prompts import PromptCache

    def make(get: Any) -> Any:
        def mixed(self: Any, prompts: Any, *, device: Any, dtype: Any) -> Any:
            self.encode(prompts)
            known = list(self._rows)
            others = [known[known.index(prompt) - 1] for prompt in prompts]
            return get(self, others, device=device, dtype=dtype)

        return mixed

    replace_in(PromptCache, "get", make)


def evaluation_without_adapter() -> None:
    from generator.wan import WanGenerator

    def make(sample: Any) -> Any:
        def base(self: Any, *args: Any, **options: Any) -> Any:
            with self.reference():
                return sample(self, *args, **options)

        return base

    replace_in(WanGenerator, "sample", make)


def evaluation_at_other_guidance() -> None:
    from generator.wan import WanGenerator

    def make(sample: Any) -> Any:
        def guided(self: Any, *args: Any, **options: Any) -> Any:
            plain = self._guided_velocity
            self._guided_velocity = lambda *prompts: plain(*prompts, scale=3.0)
            try:
                return sample(self, *args, **options)
            finally:
                del self._guided_velocity

        return guided

    replace_in(WanGenerator, "sample", make)


# ---- further faults of the same kinds ----


def loss_negated() -> None:
    from dataclasses import replace

    from alignment.policy_update import PolicyUpdate

    def make(loss: Any) -> Any:
        def negated(self: Any, *args: Any, **options: Any) -> Any:
            output = loss(self, *args, **options)
            return replace(output, loss=-output.loss)

        return negated

    replace_in(PolicyUpdate, "loss", make)


def seeds_of_step_0() -> None:
    from alignment.prompts import PromptSchedule

    replace_in(PromptSchedule, "at", lambda at: lambda self, step: at(self, 0))


def reference_is_policy() -> None:
    from contextlib import contextmanager

    from generator import wan

    @contextmanager
    def left_on(module: Any) -> Any:
        yield

    replace_in(wan, "adapters_off", lambda _: left_on)


def members_share_noise() -> None:
    from generator import sampler

    def make(noise: Any) -> Any:
        return lambda seed, member, shape, **options: noise(seed, 0, shape, **options)

    replace_in(sampler, "member_noise", make)


def advantages_over_the_batch() -> None:
    from alignment import advantages

    def over_all(reward: Any, **_: Any) -> Any:
        return (reward - reward.mean()) / (reward.std() + 1e-4)

    replace_in(advantages, "group_advantages", lambda _: over_all)


def frames_reversed() -> None:
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        return lambda self, video, prompts, *, fps: score(
            self, video.flip(1), prompts, fps=fps
        )

    replace_in(NamedReward, "score", make)


def timestep_not_scaled() -> None:
    from generator.wan import WanGenerator

    def make(velocity: Any) -> Any:
        return lambda self, x, sigma, prompts, *, guidance_scale: velocity(
            self, x, sigma / 2, prompts, guidance_scale=guidance_scale
        )

    replace_in(WanGenerator, "velocity", make)


def reward_compressed() -> None:
    """A sigmoid far from its middle."""
    of_oracle(
        lambda score, v, p, fps: change_value(
            score(v, p, fps), lambda x: (40 * x).sigmoid()
        )
    )


GUIDED = ("generator.sampler.guidance_scale=3.0",)
FAULTS = {
    "gradients-not-averaged": PlantedFault(
        ("gradients-not-averaged",), gradients_stay_local, ranks=2
    ),
    "adapter-not-in-sampler": PlantedFault(
        ("adapter-not-in-sampler",), sampler_without_adapter
    ),
    "lora-b-zero": PlantedFault(("lora-b-zero",), lora_b_reset),
    "adapter-frozen": PlantedFault(("adapter-frozen",), adapter_frozen),
    "prompts-swapped": PlantedFault(("reward-swapped",), prompts_swapped),
    "reward-blind": PlantedFault(("reward-blind",), reward_blind),
    "reward-sign": PlantedFault(("reward-sign",), reward_negated),
    "reward-saturated": PlantedFault(("reward-saturated",), reward_saturated),
    "wrong-fps": PlantedFault(("wrong-fps",), fps_of_another),
    "half-nan": PlantedFault(("scores-missing",), half_nan),
    "wrong-shift": PlantedFault(
        ("wrong-shift",), overrides=("generator.sampler.shift=12",)
    ),
    "guidance-not-in-update": PlantedFault(
        ("guidance-not-in-update",), guidance_left_out, overrides=GUIDED
    ),
    "log-prob-dtype": PlantedFault(("log-prob-dtype",), log_prob_in_half),
    "vae-scaling": PlantedFault(("vae-scaling",), latents_not_scaled),
    "wrong-embeddings": PlantedFault(("wrong-embeddings",), embeddings_mixed_up),
    "lr-too-large": PlantedFault(("lr-too-large",), overrides=("optimizer.lr=0.2",)),
    "lr-too-small": PlantedFault(("lr-too-small",), overrides=("optimizer.lr=2e-5",)),
    "kl-holds": PlantedFault(("kl-holds",), overrides=("grpo.kl_weight=2",)),
    "few-videos": PlantedFault(
        ("few-videos",), overrides=("prompts_per_step=1", "grpo.group_size=8")
    ),
    "evaluation-without-adapter": PlantedFault(
        ("evaluation-without-adapter",), evaluation_without_adapter
    ),
    # Not among the twenty, but of the same kinds.
    "evaluation-guidance": PlantedFault(
        ("evaluation-settings",), evaluation_at_other_guidance
    ),
    "swapped-inside": PlantedFault(("reward-swapped",), reward_swapped_inside),
    "loss-negated": PlantedFault(("reward-sign-in-update",), loss_negated),
    "same-seeds": PlantedFault(("same-seeds",), seeds_of_step_0),
    "reference-is-policy": PlantedFault(("reference-is-policy",), reference_is_policy),
    "members-alike": PlantedFault(("members-alike",), members_share_noise),
    "advantages-over-batch": PlantedFault(
        ("advantage-differs",), advantages_over_the_batch
    ),
    "frames-reversed": PlantedFault(("reward-other-videos",), frames_reversed),
    "timestep": PlantedFault(("rollout-differs",), timestep_not_scaled),
    "reward-compressed": PlantedFault(("reward-saturated",), reward_compressed),
    "kl-holds-100": PlantedFault(("kl-holds",), overrides=("grpo.kl_weight=0.2",)),
    "prompts-cut": PlantedFault(
        ("prompts-cut",), overrides=("generator.max_sequence_length=8",)
    ),
    "fps-setting": PlantedFault(("wrong-fps",), overrides=("generator.fps=24",)),
}
FAULTS |= OTHER_FAULTS | FURTHER_FAULTS
