"""Faults of other kinds than the twenty of `faults.py`, planted in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.launch.diagnosis.planting import (
    PlantedFault,
    change_value,
    of_oracle,
    replace_in,
)

# ---- what reaches the reward ----


def _on_the_way(change: Callable[[Any, list[str]], tuple[Any, list[str]]]) -> None:
    """Change videos or prompts on their way to every reward."""
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        def changed(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            return score(self, *change(video, list(prompts)), fps=fps)

        return changed

    replace_in(NamedReward, "score", make)


def unit_range() -> None:
    """Values of 0..1 for a reward that reads 0..255."""
    _on_the_way(lambda video, prompts: ((video / 255).to(video.dtype), prompts))


def channels_swapped_on_the_way() -> None:
    _on_the_way(lambda video, prompts: (video.flip(-1), prompts))


def channels_swapped_inside() -> None:
    of_oracle(lambda score, v, p, fps: score(v.flip(-1), p, fps))


def channels_swapped_by_the_decoder() -> None:
    from generator.latents import LatentCodec

    def make(decode: Any) -> Any:
        return lambda self, clean: decode(self, clean).flip(-1)

    replace_in(LatentCodec, "decode", make)


def first_frame_only() -> None:
    _on_the_way(lambda video, prompts: (video[:, :1].expand_as(video).clone(), prompts))


def prompts_interleaved() -> None:
    """repeat() where repeat_interleave() is right: 0 1 2 3 0 1 2 3 for 0 0 1 1 2 2 3 3."""
    _on_the_way(lambda video, prompts: (video, prompts[:: len(prompts) // 4] * 8))


# ---- scores ----


def scores_of_the_step_before() -> None:
    from alignment.rewards.errors import NamedReward

    before: dict[str, Any] = {}

    def make(score: Any) -> Any:
        def late(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            now = score(self, video, prompts, fps=fps)
            if len(prompts) < 16:
                return now
            old = before.get(self.name, now)
            before[self.name] = now
            return old

        return late

    replace_in(NamedReward, "score", make)


def scores_of_the_first_step() -> None:
    """A cache whose key is the place in the batch."""
    from alignment.rewards.errors import NamedReward

    known: dict[str, Any] = {}

    def make(score: Any) -> Any:
        def cached(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            if self.name not in known:
                known[self.name] = score(self, video, prompts, fps=fps)
            return known[self.name]

        return cached

    replace_in(NamedReward, "score", make)


def default_after_a_timeout() -> None:
    """A third of the scores of a large batch is 0.5, whatever the video is."""
    import torch

    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        def timed_out(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            late = torch.arange(len(prompts)) % 3 == 2
            known = score(self, video, prompts, fps=fps)
            return change_value(known, lambda x: torch.where(late, 0.5, x))

        return timed_out

    replace_in(NamedReward, "score", make)


def noisy_scores() -> None:
    import torch

    source = torch.Generator().manual_seed(0)
    of_oracle(
        lambda score, v, p, fps: change_value(
            score(v, p, fps),
            lambda x: x + 0.5 * torch.randn(len(x), generator=source),
        )
    )


def score_of_the_prompt() -> None:
    of_oracle(
        lambda score, v, p, fps: change_value(
            score(v, p, fps),
            lambda x: x.new_tensor([float(len(prompt)) for prompt in p]),
        )
    )


# ---- samples ----


def one_prompt_a_step() -> None:
    from dataclasses import replace

    from alignment.prompts import PromptSchedule

    def make(at: Any) -> Any:
        def repeated(self: Any, step: int) -> Any:
            batch = at(self, step)
            return replace(batch, prompts=batch.prompts[:1] * len(batch.prompts))

        return repeated

    replace_in(PromptSchedule, "at", make)


def prompts_of_the_first_step() -> None:
    from dataclasses import replace

    from alignment.prompts import PromptSchedule

    def make(at: Any) -> Any:
        return lambda self, step: replace(at(self, step), prompts=at(self, 0).prompts)

    replace_in(PromptSchedule, "at", make)


def one_seed_a_step() -> None:
    from dataclasses import replace

    from alignment.prompts import PromptSchedule

    def make(at: Any) -> Any:
        def repeated(self: Any, step: int) -> Any:
            batch = at(self, step)
            return replace(batch, seeds=batch.seeds[:1] * len(batch.seeds))

        return repeated

    replace_in(PromptSchedule, "at", make)


def seed_ignored() -> None:
    """All groups start from the noise of seed 0."""
    from generator import sampler

    def make(noise: Any) -> Any:
        return lambda seed, shape: noise(0, shape)

    replace_in(sampler, "initial_noise", make)


def videos_duplicated() -> None:
    from dataclasses import replace

    from generator.wan import WanGenerator

    def make(rollout: Any) -> Any:
        def first_only(self: Any, *args: Any, **options: Any) -> Any:
            groups = []
            for group in rollout(self, *args, **options):
                clean = group.clean_GCFHW[:1].expand_as(group.clean_GCFHW).clone()
                groups.append(replace(group, clean_GCFHW=clean))
            return groups

        return first_only

    replace_in(WanGenerator, "rollout", make)


def guidance_of_another_scale() -> None:
    from generator.wan import WanGenerator

    def make(velocity: Any) -> Any:
        return lambda self, prompt, scale=None: velocity(self, prompt, scale=6.0)

    replace_in(WanGenerator, "_guided_velocity", make)


def adapter_twice_as_strong_in_the_sampler() -> None:
    from generator.wan import WanGenerator

    def make(rollout: Any) -> Any:
        def strong(self: Any, *args: Any, **options: Any) -> Any:
            scale_adapter(self.module, 2.0)
            try:
                return rollout(self, *args, **options)
            finally:
                scale_adapter(self.module, 0.5)

        return strong

    replace_in(WanGenerator, "rollout", make)


def videos_of_the_group_before() -> None:
    """Decoding runs ahead of scoring by a group."""
    from generator.wan import WanGenerator

    before: list[Any] = []

    def make(decode: Any) -> Any:
        def late(self: Any, clean: Any) -> Any:
            video = decode(self, clean)
            if len(clean) < 8:
                return video
            used = before.pop() if before else video
            before.append(video)
            return used

        return late

    replace_in(WanGenerator, "decode", make)


def group_mean_for_every_member() -> None:
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        def averaged(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            known = score(self, video, prompts, fps=fps)
            if len(prompts) < 32:
                return known
            return change_value(
                known,
                lambda x: (
                    x.reshape(-1, 8).mean(1, keepdim=True).expand(-1, 8).flatten()
                ),
            )

        return averaged

    replace_in(NamedReward, "score", make)


def one_noise_level() -> None:
    from generator import wan

    replace_in(wan, "stochastic_steps", lambda _: lambda *args, **options: (1,))


def embeddings_of_a_batch_turned() -> None:
    """Groups of a batch are sampled with each other's prompts."""
    from dataclasses import replace

    from generator.wan import WanGenerator

    def make(rollout: Any) -> Any:
        def turned(self: Any, prompts: Any, **options: Any) -> Any:
            prompts = list(prompts)
            groups = rollout(self, [*prompts[1:], prompts[0]], **options)
            return [replace(g, prompt=p) for g, p in zip(groups, prompts, strict=True)]

        return turned

    replace_in(WanGenerator, "rollout", make)


def scale_adapter(module: Any, factor: float) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


# ---- update ----


def last_group_only() -> None:
    """All groups but the last of a step have no weight in the loss."""
    from dataclasses import replace

    from alignment.policy_update import PolicyUpdate

    count = [0]

    def make(loss: Any) -> Any:
        def without(self: Any, *args: Any, **options: Any) -> Any:
            output = loss(self, *args, **options)
            count[0] += 1
            return (
                output if count[0] % 4 == 0 else replace(output, loss=0 * output.loss)
            )

        return without

    replace_in(PolicyUpdate, "loss", make)


def only_good_members() -> None:
    """Negative advantages are cut in the loss."""
    from alignment import policy_update

    def make(loss: Any) -> Any:
        return lambda log_prob, old, advantage, kl, **options: loss(
            log_prob, old, advantage.clamp(min=0), kl, **options
        )

    replace_in(policy_update, "grpo_group_loss", make)


def advantages_over_prompts() -> None:
    """Normalised over the wrong axis."""
    from alignment import advantages

    def over_prompts(reward_PG: Any, **_: Any) -> Any:
        centred_PG = reward_PG - reward_PG.mean(0)
        return centred_PG / (reward_PG.std(0) + 1e-4)

    replace_in(advantages, "group_advantages", lambda _: over_prompts)


def advantages_of_other_groups() -> None:
    from dataclasses import replace

    from alignment.policy_update import PolicyUpdate

    def make(update: Any) -> Any:
        return lambda self, groups, advantages, **options: update(
            self,
            groups,
            replace(advantages, advantage_PM=advantages.advantage_PM.flip(0)),
            **options,
        )

    replace_in(PolicyUpdate, "update", make)


def update_on_old_groups() -> None:
    from alignment.policy_update import PolicyUpdate

    before: list[Any] = []

    def make(update: Any) -> Any:
        def late(self: Any, groups: Any, advantages: Any, **options: Any) -> Any:
            used = before.pop() if before else groups
            before.append(groups)
            return update(self, used, advantages, **options)

        return late

    replace_in(PolicyUpdate, "update", make)


def _loss_with(change: Callable[[Any, Any, dict[str, Any]], tuple[Any, Any]]) -> None:
    """Change the KL or its weight in the loss."""
    from alignment import policy_update

    def make(loss: Any) -> Any:
        def changed(
            log_prob: Any, old: Any, advantage: Any, kl: Any, **options: Any
        ) -> Any:
            return loss(log_prob, old, advantage, change(kl, options), **options)

        return changed

    replace_in(policy_update, "grpo_group_loss", make)


def kl_negated_in_the_loss() -> None:
    def turned(kl: Any, options: dict[str, Any]) -> Any:
        options["kl_weight_scaled"] *= -1
        return kl

    _loss_with(turned)


def kl_without_gradient() -> None:
    _loss_with(lambda kl, options: kl.detach())


def kl_negated() -> None:
    from common import gaussian

    replace_in(gaussian, "kl_same_std", lambda kl: lambda p, q: -kl(p, q))


def optimizer_lacks_half() -> None:
    """The optimizer was built before some of the adapter's matrices were there."""
    import torch

    from engine.skip_nonfinite import SkipNonFinite

    first: dict[str, Any] = {}

    def make(step: Any) -> Any:
        def partly(self: Any) -> None:
            lacking = {
                name: p
                for name, p in self.engine.module.named_parameters()
                if p.requires_grad and "to_q" in name
            }
            for name, parameter in lacking.items():
                first.setdefault(name, parameter.detach().clone())
            step(self)
            with torch.no_grad():
                for name, parameter in lacking.items():
                    parameter.copy_(first[name])

        return partly

    replace_in(SkipNonFinite, "step", make)


def rate_of_a_forgotten_schedule() -> None:
    from torch.optim import lr_scheduler

    def make(init: Any) -> Any:
        def small(self: Any, optimizer: Any, share: Any, **options: Any) -> None:
            init(self, optimizer, lambda done: 0.01 * share(done), **options)

        return small

    replace_in(lr_scheduler.LambdaLR, "__init__", make)


def average_never_updated() -> None:
    from engine.ema import Ema

    replace_in(Ema, "update", lambda _: lambda self: None)


def evaluation_of_old_weights() -> None:
    """As an average that lags behind: a quarter of the adapter's effect."""
    from generator.wan import WanGenerator

    def make(sample: Any) -> Any:
        def lagging(self: Any, *args: Any, **options: Any) -> Any:
            scale_adapter(self.module, 0.25)
            try:
                return sample(self, *args, **options)
            finally:
                scale_adapter(self.module, 4.0)

        return lagging

    replace_in(WanGenerator, "sample", make)


OTHER_FAULTS = {
    "unit-range": PlantedFault(("reward-other-videos",), unit_range),
    "channels-on-the-way": PlantedFault(
        ("reward-other-videos",), channels_swapped_on_the_way
    ),
    "channels-inside": PlantedFault(("channels-swapped",), channels_swapped_inside),
    "channels-decoder": PlantedFault(
        ("channels-swapped",), channels_swapped_by_the_decoder
    ),
    "first-frame": PlantedFault(("reward-other-videos",), first_frame_only),
    "prompts-interleaved": PlantedFault(("reward-swapped",), prompts_interleaved),
    "scores-late": PlantedFault(("reward-stale",), scores_of_the_step_before),
    "scores-cached": PlantedFault(("reward-stale",), scores_of_the_first_step),
    "score-default": PlantedFault(("reward-default",), default_after_a_timeout),
    "score-noisy": PlantedFault(("reward-random",), noisy_scores),
    "score-of-prompt": PlantedFault(("reward-blind-to-video",), score_of_the_prompt),
    "one-prompt": PlantedFault(("prompts-repeat",), one_prompt_a_step),
    "same-prompts": PlantedFault(("same-prompts",), prompts_of_the_first_step),
    "one-seed": PlantedFault(("same-seeds",), one_seed_a_step),
    "seed-ignored": PlantedFault(("wrong-noise",), seed_ignored),
    "videos-duplicated": PlantedFault(("members-alike",), videos_duplicated),
    "one-noise-level": PlantedFault(("one-noise-level",), one_noise_level),
    "little-noise": PlantedFault(
        ("members-alike",), overrides=("generator.sampler.noise_level=0.003",)
    ),
    "prompts-turned": PlantedFault(("wrong-embeddings",), embeddings_of_a_batch_turned),
    "guidance-scale": PlantedFault(
        ("guidance-differs",),
        guidance_of_another_scale,
        overrides=("generator.sampler.guidance_scale=3.0",),
    ),
    "adapter-strength": PlantedFault(
        ("adapter-scaling",), adapter_twice_as_strong_in_the_sampler
    ),
    "videos-late": PlantedFault(("reward-other-videos",), videos_of_the_group_before),
    "score-of-group": PlantedFault(
        ("reward-blind-to-video",), group_mean_for_every_member
    ),
    "last-group": PlantedFault(("loss-differs",), last_group_only),
    "only-good": PlantedFault(("loss-differs",), only_good_members),
    "advantages-axis": PlantedFault(("advantage-differs",), advantages_over_prompts),
    "advantages-of-others": PlantedFault(("loss-differs",), advantages_of_other_groups),
    "old-groups": PlantedFault(("loss-differs",), update_on_old_groups),
    "kl-sign-in-loss": PlantedFault(("kl-sign",), kl_negated_in_the_loss),
    "kl-without-gradient": PlantedFault(("kl-differs",), kl_without_gradient),
    "kl-sign": PlantedFault(("kl-sign",), kl_negated),
    "optimizer-lacks-half": PlantedFault(("adapter-frozen",), optimizer_lacks_half),
    "rate-differs": PlantedFault(("lr-differs",), rate_of_a_forgotten_schedule),
    "gradient-clipped": PlantedFault(
        ("gradient-clipped",), overrides=("optimizer.max_grad_norm=1e-6",)
    ),
    "weight-decay": PlantedFault(
        ("weight-decay",), overrides=("optimizer.weight_decay=50",)
    ),
    "ema-frozen": PlantedFault(
        ("ema-frozen",), average_never_updated, overrides=("ema.decay=0.9",)
    ),
    "evaluation-lags": PlantedFault(
        ("evaluation-settings",), evaluation_of_old_weights
    ),
}
