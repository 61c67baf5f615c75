"""Neighbours of the twenty faults of `faults.py`, planted after the rules were written."""

from __future__ import annotations

from typing import Any

from tests.launch.diagnosis.planting import PlantedFault, replace_in

# ---- sampler and update ----


def sampler_lags() -> None:
    """The sampler gets the weights a rollout late."""
    import torch

    from generator.wan import WanGenerator

    handed: dict[str, Any] = {}

    def make(rollout: Any) -> Any:
        def late(self: Any, *args: Any, **options: Any) -> Any:
            trained = {
                name: p for name, p in self.module.named_parameters() if p.requires_grad
            }
            now = {name: p.detach().clone() for name, p in trained.items()}
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(handed.get(name, now[name]))
                try:
                    return rollout(self, *args, **options)
                finally:
                    for name, parameter in trained.items():
                        parameter.copy_(now[name])

        return late

    def make_step(step: Any) -> Any:
        def stepped(self: Any) -> None:
            last = self.engine.is_gradient_accumulation_boundary()
            if last:
                for name, p in self.engine.module.named_parameters():
                    if p.requires_grad:
                        handed[name.removeprefix("module.")] = p.detach().clone()
            step(self)

        return stepped

    from engine.skip_nonfinite import SkipNonFinite

    replace_in(SkipNonFinite, "step", make_step)
    replace_in(WanGenerator, "rollout", make)


def update_a_step_later() -> None:
    """The update computes its transition at the next noise level."""
    from generator.wan import WanGenerator

    def make(transition: Any) -> Any:
        def later(self: Any, prompt: str, step: Any) -> Any:
            import torch

            x = step.latent_MCFHW.to(self.device)
            sigma = torch.full((len(x),), step.sigma_next)
            v = self.velocity(x, sigma, [prompt] * len(x), guidance_scale=1.0)
            return self.kernel.transition(x, v, step.sigma, step.sigma_next)

        return later

    replace_in(WanGenerator, "transition", make)


def guidance_turned() -> None:
    """Conditional and unconditional branch change places: c + s (u - c)."""
    from generator.wan import WanGenerator

    def make(velocity: Any) -> Any:
        return lambda self, x, sigma, prompts, *, guidance_scale: velocity(
            self, x, sigma, prompts, guidance_scale=1 - guidance_scale
        )

    replace_in(WanGenerator, "velocity", make)


def noise_too_small() -> None:
    """Members get 0.7 times the noise of their density."""
    from generator import sampler

    def make(noise: Any) -> Any:
        return lambda *args, **options: 0.7 * noise(*args, **options)

    replace_in(sampler, "member_noise", make)


def grid_of_another_shift() -> None:
    from generator import wan

    replace_in(
        wan, "sigma_grid", lambda grid: lambda steps, *, shift: grid(steps, shift=5.0)
    )


def embeddings_empty() -> None:
    from generator.prompts import PromptCache

    def make(get: Any) -> Any:
        return lambda self, *args, **options: 0 * get(self, *args, **options)

    replace_in(PromptCache, "get", make)


def latents_mean_left_out() -> None:
    import torch

    from generator.latents import LatentCodec

    def make(both: Any) -> Any:
        def without(self: Any, device: Any) -> Any:
            mean, std = both(self, device)
            return torch.zeros_like(mean), std

        return without

    replace_in(LatentCodec, "_mean_and_std", make)


# ---- rewards and advantages ----


def weights_ignored() -> None:
    """The reward that is only watched is trained on."""
    from alignment import grpo

    def make(advantages: Any) -> Any:
        def turned(scores: Any, weights: Any, *args: Any, **options: Any) -> Any:
            swapped = {name: 1.0 - weight for name, weight in weights.items()}
            return advantages(scores, swapped, *args, **options)

        return turned

    replace_in(grpo, "group_relative_advantages", make)


def prompts_lengthened() -> None:
    """The reward reads a prompt that somebody has improved."""
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        return lambda self, video, prompts, *, fps: score(
            self, video, [f"{prompt}, best quality" for prompt in prompts], fps=fps
        )

    replace_in(NamedReward, "score", make)


def rewards_shuffled_in_their_group() -> None:
    from alignment import advantages

    def make(normalise: Any) -> Any:
        return lambda reward, **options: normalise(reward.roll(1, dims=1), **options)

    replace_in(advantages, "group_advantages", make)


def some_scores_infinite() -> None:
    import torch

    from alignment.rewards.errors import NamedReward
    from tests.launch.diagnosis.planting import change_value

    def make(score: Any) -> Any:
        def infinite(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            def change(x: Any) -> Any:
                bad = torch.arange(len(x)) % 3 == 0
                return torch.where(bad, torch.full_like(x, float("inf")), x)

            return change_value(score(self, video, prompts, fps=fps), change)

        return infinite

    replace_in(NamedReward, "score", make)


# ---- update and evaluation ----


def last_backward_alone() -> None:
    """Gradients are zeroed before every backward, so that the last one is all there is."""
    from engine.skip_nonfinite import SkipNonFinite

    def make(backward: Any) -> Any:
        def alone(self: Any, loss: Any) -> None:
            last = self.engine.is_gradient_accumulation_boundary()
            backward(self, loss if last else 0 * loss)

        return alone

    replace_in(SkipNonFinite, "backward", make)


def evaluation_with_fewer_steps() -> None:
    from generator.wan import WanGenerator

    def make(sample: Any) -> Any:
        def short(self: Any, *args: Any, **options: Any) -> Any:
            return sample(self, *args, **{**options, "num_steps": 3})

        return short

    replace_in(WanGenerator, "sample", make)


GUIDED = ("generator.sampler.guidance_scale=3.0",)
FURTHER_FAULTS = {
    "sampler-lags": PlantedFault(("sampler-lags",), sampler_lags),
    "update-later": PlantedFault(("update-differs",), update_a_step_later),
    "guidance-turned": PlantedFault(
        ("guidance-differs",), guidance_turned, overrides=GUIDED
    ),
    "noise-too-small": PlantedFault(("noise-size",), noise_too_small),
    "grid-of-another-shift": PlantedFault(("wrong-shift",), grid_of_another_shift),
    "embeddings-empty": PlantedFault(("wrong-embeddings",), embeddings_empty),
    "latents-mean": PlantedFault(("vae-scaling",), latents_mean_left_out),
    "weights-ignored": PlantedFault(
        ("advantage-differs",),
        weights_ignored,
        overrides=("rewards.dynamics={weight: 0}",),
    ),
    "prompts-lengthened": PlantedFault(("reward-other-prompts",), prompts_lengthened),
    "rewards-shuffled": PlantedFault(
        ("advantage-differs",), rewards_shuffled_in_their_group
    ),
    "scores-infinite": PlantedFault(("scores-missing",), some_scores_infinite),
    "last-backward": PlantedFault(("loss-differs",), last_backward_alone),
    "evaluation-steps": PlantedFault(
        ("evaluation-settings",), evaluation_with_fewer_steps
    ),
    "evaluation-trained": PlantedFault(
        ("evaluation-trained",),
        overrides=(
            "evaluation.prompts=assets/shapes/prompts_train.txt",
            "evaluation.every=100",
            "evaluation.limit=2",
        ),
    ),
}
