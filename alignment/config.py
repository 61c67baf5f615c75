"""Settings of the alignment algorithms and of rewards. No torch here."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from common.plugin_file import file_of
from common.schema import (
    NonEmptyText,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    config,
)

# A group or a set of candidates of one has nothing to compare with.
AtLeastTwo = Annotated[int, Field(ge=2)]


@config
class GrpoConfig:
    """Longcat-GRPO. Defaults are LongCat-Video's (2510.22200, Table 9 and Algorithm 1).

    group_size      G, videos per prompt.
    scale           what a centred reward is divided by: "none", the standard deviation of
                    its "group", the largest of any group ("max_group"), or that of all
                    rewards of the "batch".
    advantage_eps   added to that standard deviation.
    advantage_clip  bound of the summed advantage; null for none.
    clip_low        the ratio is clipped below 1 - clip_low; null does not clip, which is the
                    paper's choice: with one update per rollout every ratio is 1.
    clip_high       the ratio is clipped above 1 + clip_high; null does not clip.
    kl_weight       weight of the KL to the reference policy; 0 saves its forward.
    reweight        how the losses are freed of the noise schedule (section 3.3.1, equations
                    6 to 8): "finite" for truncated noise, the "paper"'s form, "unit" or
                    "none", see `alignment.grpo_losses.step_weights`.
    normalize_step_weights  divide these weights by their MEAN over all groups and steps of
                    an update (Flash-GRPO 2605.15980).
    updates         optimizer steps on one rollout; more than one needs a clip.
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

    group_size: AtLeastTwo = 4
    scale: Literal["none", "group", "max_group", "batch"] = "max_group"
    advantage_eps: NonNegativeFloat = 1e-4
    advantage_clip: PositiveFloat | None = None
    clip_low: PositiveFloat | None = None
    clip_high: PositiveFloat | None = None
    kl_weight: NonNegativeFloat = 3e-4
    reweight: Literal["none", "finite", "paper", "unit"] = "finite"
    normalize_step_weights: bool = False
    updates: PositiveInt = 1
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
        if self.updates > 1 and self.clip_low is None:
            raise ValueError(
                f"updates={self.updates} on one rollout need clip_low and clip_high"
            )
        if self.group_size % self.ranks_per_group:
            raise ValueError(
                f"ranks_per_group={self.ranks_per_group} must divide "
                f"group_size={self.group_size}"
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
