"""Settings of the alignment algorithms and of rewards. No torch here."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from common.plugin_file import file_of
from common.schema import (
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
# A group or a set of candidates of one has nothing to compare with.
AtLeastTwo = Annotated[int, Field(ge=2)]


@config
class OldPolicyConfig:
    """The policy that samples for a forward objective: an average of the trained weights.

    After the update number n of the run, old <- d old + (1 - d) theta, with

        d = 0 for n < flat_steps, else min(ramp_rate (n - flat_steps), max_decay).

    At max_decay 0 the policy of now samples, and no copy is kept. DiffusionNFT's types
    (2509.16117, release): 1 is (0, 0.001, 0.5), 2 is (75, 0.0075, 0.999).

    flat_steps  updates before the ramp.
    ramp_rate   rise of d per update.
    max_decay   the largest d.
    """

    flat_steps: NonNegativeInt = 0
    ramp_rate: NonNegativeFloat = 0.001
    max_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def decay(self, update: int) -> float:
        """Return d of update number ``update``, counted from 1 (`engine.old_policy`)."""
        if update < self.flat_steps:
            return 0.0
        return min(self.ramp_rate * (update - self.flat_steps), self.max_decay)


@config
class ForwardConfig:
    """Settings of the forward objectives nft, awm and dgpo, see `alignment.forward_losses`.

    timesteps_per_sample  noise levels, with a noise each, that an update trains of a video.
    timestep_range  the part of the rollout's grid that they are drawn from, from noise (0) to
                    video (1). At sigma near 0 there is no signal, so the end is left out.
    micro_batch     noised latents in a backward; it must divide the members of a group on a
                    rank times timesteps_per_sample. With dgpo it is the whole group.
    beta            nft: how far v+ and v- go beyond the old policy. A small one holds the policy
                    closer to the old one; where that is the policy of now it has no effect.
    adaptive_weight nft: divide the error of a sample by its absolute error.
    weighting       awm: how a noise level weights the error, "uniform", "t", "t2", "huber" or
                    "ghuber".
    proximal_weight awm: weight of mean((v_theta - v_old)^2), for an old policy that is an
                    average.
    group_beta      dgpo: how soon a group that the policy orders better than its reference is let
                    go of; 10 to 100 are usual.
    old_policy      the policy that samples, see `OldPolicyConfig`.
    allow_distilled train a base that is distilled to a few steps. Flow matching is the wrong
                    objective for it: videos blur and collapse.
    """

    timesteps_per_sample: PositiveInt = 1
    timestep_range: tuple[Share, Share] = (0.0, 0.99)
    micro_batch: PositiveInt = 1
    beta: PositiveFloat = 0.1
    adaptive_weight: bool = True
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    proximal_weight: NonNegativeFloat = 0.0
    group_beta: PositiveFloat = 100.0
    old_policy: OldPolicyConfig = field(default_factory=OldPolicyConfig)
    allow_distilled: bool = False

    def __post_init__(self) -> None:
        first, last = self.timestep_range
        if first >= last:
            raise ValueError(
                f"timestep_range must rise from noise to video, got {first} and {last}"
            )

    def trained_places(self, steps: int) -> range:
        """Which of a grid's steps may be trained: int(first T) to int(last T) - 1 of T."""
        first, last = self.timestep_range
        return range(int(first * steps), int(last * steps))


@config
class RewardCondition:
    """A reward counts only where another one is good enough.

    reward    name of the other reward, whose weight may be 0.
    at_least  the value that it must reach.
    """

    reward: NonEmptyText
    at_least: Annotated[float, Field(allow_inf_nan=False)]


@config
class GrpoConfig:
    """Longcat-GRPO. Defaults are LongCat-Video's (2510.22200, Table 9 and Algorithm 1).

    objective       "policy" is the policy gradient; "nft" (DiffusionNFT), "awm" (advantage
                    weighted matching) and "dgpo" (direct group preference optimization) fit the
                    velocity to the videos by their advantages, and sample with any solver, see
                    docs/objectives.md.
    forward         settings of nft, awm and dgpo.
    group_size      G, videos per prompt.
    scale           what a centred reward is divided by: "none", the standard deviation of
                    its "group", the largest of any group ("max_group"), or that of all
                    rewards of the "batch".
    advantage_eps   added to that standard deviation.
    reward_transform  what a reward is within its group: itself ("none"), the mean probability to
                    be preferred to another member ("win_rate"), or its "rank".
    win_temperature of win_rate, in units of the reward; needed there, and null otherwise.
    reward_given    reward -> {reward, at_least}: it counts only for videos whose other reward is
                    at least that; the others get the least value of their group.
    advantage_norm  "batch" gives the summed advantages of a step mean 0 and standard deviation
                    1 (GDPO 2601.05242), "none" leaves the sum as it is.
    advantage_clip  bound of the summed advantage; null for none.
    clip_low        the ratio is clipped below 1 - clip_low; null does not clip, which is the
                    paper's choice: with one update per rollout every ratio is 1.
    clip_high       the ratio is clipped above 1 + clip_high; null does not clip.
    kl_weight       weight of the KL to the reference policy; 0 saves its forward. With nft, awm
                    and dgpo it is that of mean((v - v_ref)^2), where the policy gradient has
                    kl_weight c~^2 / 2 of it, see docs/objectives.md.
    reweight        how the losses are freed of the noise schedule (section 3.3.1, equations
                    6 to 8): "finite" for truncated noise, the "paper"'s form, "unit" or
                    "none", see `alignment.grpo_losses.step_weights`.
    normalize_step_weights  divide these weights by their MEAN over all groups and steps of
                    an update (Flash-GRPO 2605.15980).
    updates         optimizer steps on one rollout. More than one needs ``ratio`` or
                    ``divergence_clip``, see docs/objectives.md.
    ratio           what the clips bound: the "plain" ratio r of log-probs, which leans below 1
                    by the divergence D of the two policies, or the "normalized" one without
                    this bias, exp(std (log r + D)) (GRPO-Guard 2510.22319), whose clips are
                    in units of std times log-prob. Null is plain where every ratio is 1.
    divergence_clip a member's loss is 0 where D is at least this number and the member would
                    move the policy further (Flow-DPPO 2606.11025); null never does that.
    ranks_per_group how many ranks share a group's members, for more ranks than prompts.
                    Each of these ranks computes what the members share.
    overlap_scoring score a group in a thread while the next is sampled, for rewards that
                    wait for another process or machine.
    videos_per_call videos of a rank that rewards score in one call, in whole groups. Frames
                    are let go after it, so it bounds the host memory of a step; with
                    overlap_scoring, it bounds the videos that wait for the thread.
    flat_reward_patience  the run stops when no trained reward told two videos of a group
                    apart in its first so many steps; null never stops.
    """

    objective: Literal["policy", "nft", "awm", "dgpo"] = "policy"
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    group_size: AtLeastTwo = 4
    scale: Literal["none", "group", "max_group", "batch"] = "max_group"
    advantage_eps: NonNegativeFloat = 1e-4
    reward_transform: Literal["none", "win_rate", "rank"] = "none"
    win_temperature: PositiveFloat | None = None
    reward_given: dict[str, RewardCondition] = field(default_factory=dict)
    advantage_norm: Literal["none", "batch"] = "none"
    advantage_clip: PositiveFloat | None = None
    clip_low: PositiveFloat | None = None
    clip_high: PositiveFloat | None = None
    kl_weight: NonNegativeFloat = 3e-4
    reweight: Literal["none", "finite", "paper", "unit"] = "finite"
    normalize_step_weights: bool = False
    updates: PositiveInt = 1
    ratio: Literal["plain", "normalized"] | None = None
    divergence_clip: PositiveFloat | None = None
    ranks_per_group: PositiveInt = 1
    overlap_scoring: bool = False
    videos_per_call: PositiveInt = 64
    flat_reward_patience: PositiveInt | None = 10

    def __post_init__(self) -> None:
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError(
                "clip_low and clip_high must both be numbers or both be null, "
                f"got {self.clip_low} and {self.clip_high}"
            )
        self._check_advantages()
        if self.objective == "policy":
            self._check_trust_region()
            if self.forward != ForwardConfig():
                raise ValueError(
                    "forward is for objective nft, awm or dgpo, got objective=policy"
                )
        if self.group_size % self.ranks_per_group:
            raise ValueError(
                f"ranks_per_group={self.ranks_per_group} must divide "
                f"group_size={self.group_size}"
            )
        if self.objective != "policy":
            self._check_forward()

    def _check_advantages(self) -> None:
        name = self.reward_transform
        if (name == "win_rate") != (self.win_temperature is not None):
            raise ValueError(
                "win_temperature belongs to reward_transform=win_rate, in units of the reward, "
                f"got {self.win_temperature} with reward_transform={name}"
            )
        # a group of nearly equal rewards would get the advantages of a clear one
        if name != "none" and self.scale == "group":
            raise ValueError(
                f"reward_transform={name} keeps nearly equal groups small, and scale=group blows "
                "them up again: use scale=none or max_group"
            )
        # rewards in their own units would be summed as they are
        if self.advantage_norm == "batch" and self.scale in ("none", "batch"):
            raise ValueError(
                "advantage_norm=batch normalises a sum of rewards that are each on the scale of "
                f"their groups: use scale=group or max_group, got {self.scale}"
            )
        # other names are known to the run only
        for reward, condition in self.reward_given.items():
            if condition.reward == reward:
                raise ValueError(
                    f"reward_given.{reward} cannot depend on itself; name another reward"
                )

    @property
    def samples_per_group(self) -> int:
        """Noised latents of a group that a rank trains in an update of nft, awm or dgpo."""
        members = self.group_size // self.ranks_per_group
        return members * self.forward.timesteps_per_sample

    @property
    def has_old_policy(self) -> bool:
        """Whether another policy than that of the update samples: a copy of the weights."""
        if self.objective == "policy":
            return False
        return self.updates > 1 or self.forward.old_policy.max_decay > 0

    @property
    def has_reference(self) -> bool:
        """Whether an update computes the reference policy: for the KL, and always with dgpo."""
        return self.kl_weight > 0 or self.objective == "dgpo"

    def _check_forward(self) -> None:
        # 1. What only the policy gradient has.
        name = self.objective
        for key in ("ratio", "divergence_clip"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}={getattr(self, key)} is for objective=policy, got objective={name}"
                )
        if self.normalize_step_weights:
            raise ValueError(
                f"normalize_step_weights=true is for objective=policy, got objective={name}"
            )
        # 2. What each of them needs.
        if name == "nft" and self.advantage_clip is None:
            raise ValueError(
                "objective=nft needs advantage_clip, the advantage at which a video is only "
                "imitated: 5 in its release, with scale=batch"
            )
        if name == "nft" and self.clip_low is not None:
            raise ValueError(
                "objective=nft has no ratio: clip_low and clip_high must be null; beta and "
                "old_policy hold its policy back"
            )
        if name == "awm" and self.has_old_policy and self.clip_low is None:
            raise ValueError(
                "objective=awm with updates above 1 or an old_policy needs clip_low and "
                "clip_high; its release has 1 for both"
            )
        if name == "dgpo":
            self._check_dgpo()
        # 3. Equal micro-batches, so that their mean is the mean over samples.
        if self.samples_per_group % self.forward.micro_batch:
            raise ValueError(
                f"forward.micro_batch={self.forward.micro_batch} must divide the "
                f"{self.samples_per_group} noised latents of a group on a rank"
            )

    def _check_dgpo(self) -> None:
        if self.clip_low is not None:
            raise ValueError(
                "objective=dgpo has no ratio: clip_low and clip_high must be null; group_beta "
                "and kl_weight hold its policy back"
            )
        if self.has_old_policy:
            raise ValueError(
                "objective=dgpo compares the policy with its reference and has no old policy: "
                "set updates=1 and forward.old_policy.max_decay=0, or use objective=nft or awm"
            )
        # the weight of a group needs all of its errors before the first backward
        if self.ranks_per_group > 1 or self.forward.micro_batch != self.group_size:
            raise ValueError(
                "objective=dgpo weighs a group as a whole: set ranks_per_group=1 and "
                f"forward.micro_batch={self.group_size}, the group_size, got "
                f"{self.ranks_per_group} and {self.forward.micro_batch}"
            )

    def _check_trust_region(self) -> None:
        # A single update never leaves the policy that sampled.
        if self.updates == 1:
            for key in ("ratio", "divergence_clip"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key}={getattr(self, key)} needs updates above 1: with a single "
                        "update on a rollout every ratio is 1 and every divergence 0"
                    )
            return
        if self.divergence_clip is not None:
            return
        if self.clip_low is None:
            raise ValueError(
                f"updates={self.updates} on one rollout need clip_low and clip_high, or "
                "divergence_clip"
            )
        # most ratios of a large video lie below 1, so plain clips hold back one sign only
        if self.ratio is None:
            raise ValueError(
                f"updates={self.updates} on one rollout need ratio=normalized with clips in its "
                "units, or divergence_clip; ratio=plain is for small latents only"
            )


@config
class PairConfig:
    """How pairs are chosen among a prompt's videos, see `alignment.pairs.choose`.

    candidates  K, videos per prompt.
    min_margin  the chosen video must lead by this many standard deviations of the reward;
                0 drops ties only.
    agreement   drop pairs whose rejected video some reward prefers.
    """

    candidates: AtLeastTwo = 8
    min_margin: NonNegativeFloat = 0.0
    agreement: bool = True


@config
class DpoConfig:
    """Training on pairs. Defaults are Flow-DPO's (2501.13918, Table 10).

    Errors are MEANS over latent elements, and beta is in these units.

    method          "dpo"; "rwr" weights all videos by exp(reward / temperature); "sft"
                    trains on the chosen videos alone.
    beta            how strongly the policy is held to its reference; 100 to 5000 are usual.
    beta_schedule   "constant", or "quadratic": beta (1 - sigma)^2, see
                    `alignment.dpo_losses.beta_at`.
    sft_weight      weight of the chosen video's error, added to the DPO loss so that this
                    error does not rise; 0 for none.
    temperature     of rwr, in standard deviations of the reward.
    noise           how sigma is drawn: "uniform" in (0, 1), or "logit_normal", the sigmoid
                    of N(0, 1); the shift follows.
    noise_shift     s in sigma -> s sigma / (1 + (s - 1) sigma); 1 changes nothing.
    pairs_per_step  pairs of an optimizer step, over ALL ranks.
    micro_batch     pairs in a forward; the transformer runs twice as many samples.
    epochs          passes over the pairs; 0.5 uses every second pair.
    displacement_window   steps over which the chosen video's error is averaged.
    stop_on_displacement  stop when that average is above the reference's: the policy then
                    moves away from the rejected video instead of towards the chosen one
                    (likelihood displacement). If false, the run warns once.
    """

    method: Literal["dpo", "rwr", "sft"] = "dpo"
    beta: PositiveFloat = 500.0
    beta_schedule: Literal["constant", "quadratic"] = "constant"
    sft_weight: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 1.0
    noise: Literal["uniform", "logit_normal"] = "uniform"
    noise_shift: PositiveFloat = 1.0
    pairs_per_step: PositiveInt = 64
    micro_batch: PositiveInt = 1
    epochs: PositiveFloat = 1.0
    displacement_window: PositiveInt = 20
    stop_on_displacement: bool = False

    def __post_init__(self) -> None:
        if self.sft_weight > 0 and self.method != "dpo":
            raise ValueError(f"sft_weight needs method dpo, got method {self.method}")


@config
class RewardConfig:
    """A reward plug-in; its name is its key in the run's ``rewards``.

    kind        a key of `alignment.rewards.REWARDS`, or a name that an installed package
                offers as an entry point of video_alignment.rewards. Null takes the reward's
                name, so ``rewards: {descore: {}}`` is enough.
    target      path/to/file.py:name of a user's function, class or object, instead of kind.
    url         http://host:port of a reward server (launch/serve.py), instead of kind; a
                list of servers share the videos, and one that dies is left out.
    weight      of its advantages in the sum; 0 scores and logs without training on it.
    checkpoint  folder of the weights, for rewards that have some.
    options     keyword arguments of its constructor.
    """

    kind: NonEmptyText | None = None
    target: str | None = None
    url: str | tuple[str, ...] | None = None
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind is not None and self.target is not None:
            raise ValueError(
                f"kind={self.kind} and target={self.target} exclude each other"
            )
        has_other_source = self.target is not None or self.kind not in (None, "remote")
        if self.url is not None and has_other_source:
            raise ValueError(
                f"url={self.url} names a remote reward and excludes target and other kinds"
            )

    def is_kind(self, name: str, kind: str) -> bool:
        """Whether this is a reward of that kind, under its name in the run's ``rewards``."""
        if self.target is not None or self.url is not None:
            return False
        return (self.kind or name) == kind

    def thinks_when_unsure(self, name: str) -> bool:
        """Whether this is a DeScore that decides for all videos of a prompt together."""
        return self.is_kind(name, "descore") and (
            self.options.get("thinking") == "adaptive"
        )

    @property
    def files(self) -> list[str]:
        """The files and folders that decide what the reward returns: weights and code."""
        files = [] if self.checkpoint is None else [self.checkpoint]
        return files if self.target_file is None else [*files, self.target_file]

    @property
    def target_file(self) -> str | None:
        """The file of ``target``, found from any folder if it ships with the project."""
        if self.target is None:
            return None
        return file_of(self.target)

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of the reward's servers; empty for any other reward."""
        if self.url is None:
            return ()
        return (self.url,) if isinstance(self.url, str) else self.url
