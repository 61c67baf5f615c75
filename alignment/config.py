"""What an alignment run is made of. No torch here: a wrong value must be an error within two seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def _check(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


@dataclass(frozen=True)
class GrpoConfig:
    """Longcat-GRPO. Defaults are LongCat-Video's (2510.22200, Table 9 and Algorithm 1).

    group_size      G, videos per prompt
    scale           what a centred reward is divided by: nothing, its group's spread, the largest spread of any group,
                    or the spread of all rewards of the batch
    advantage_eps   added to that spread
    advantage_clip  bound of the summed advantage, null for none
    clip_low/high   the ratio may leave [1 - low, 1 + high] no further; null for none, which is the paper's choice:
                    with one update per rollout every ratio is 1
    kl_weight       beta; 0 also saves the reference's forward
    reweight        how both loss terms are freed of the noise schedule (section 3.3.1, equations 6 to 8): "finite" for
                    truncated noise, the "paper"'s own form, "unit", or "none"; see `alignment.grpo_losses.step_weights`
    normalize_step_weights   divide these weights by their MEAN over all groups and steps of an update (Flash-GRPO 2605.15980)
    updates         passes over a rollout, each an optimizer step; more than one needs a clip
    ranks_per_group  how many ranks share one group's members, each group_size / ranks_per_group of them: where there
                    are more ranks than prompts in a step. What the members share each computes by itself, at one time
    overlap_scoring  roll out and score group by group, a group's scoring in a thread beside the next one's rollout:
                    for rewards that wait for another process, another machine, or their own Python
    update          "collapsed" does one forward and backward per step of a group; "per_member" does one for each
                    member, the same gradient at G times the cost, for proofs and measurements
    """

    group_size: int = 4
    scale: Literal["none", "group", "max_group", "batch"] = "max_group"
    advantage_eps: float = 1e-4
    advantage_clip: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    kl_weight: float = 3e-4
    reweight: Literal["none", "finite", "paper", "unit"] = "finite"
    normalize_step_weights: bool = False
    updates: int = 1
    ranks_per_group: int = 1
    overlap_scoring: bool = False
    update: Literal["collapsed", "per_member"] = "collapsed"

    def __post_init__(self) -> None:
        problems = []
        if self.group_size < 2:
            problems.append(
                f"group_size must be at least 2, a group of one has no spread, got {self.group_size}"
            )
        if self.advantage_eps < 0:
            problems.append(
                f"advantage_eps must be at least 0, got {self.advantage_eps}"
            )
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            problems.append(
                f"advantage_clip must be positive or null, got {self.advantage_clip}"
            )
        if (self.clip_low is None) != (self.clip_high is None):
            problems.append(
                f"clip_low and clip_high go together, got {self.clip_low} and {self.clip_high}"
            )
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name} must be positive or null, got {value}")
        if self.updates < 1:
            problems.append(f"updates must be at least 1, got {self.updates}")
        elif self.updates > 1 and self.clip_low is None:
            problems.append(
                f"updates={self.updates} on one rollout move away from it: clip_low and clip_high must be set"
            )
        if self.ranks_per_group < 1 or self.group_size % self.ranks_per_group:
            problems.append(
                f"ranks_per_group must divide group_size={self.group_size}, so that all have equally many members, "
                f"got {self.ranks_per_group}"
            )
        if self.kl_weight < 0:
            problems.append(f"kl_weight must be at least 0, got {self.kl_weight}")
        _check("GrpoConfig", problems)


@dataclass(frozen=True)
class PairConfig:
    """How pairs are made of a prompt's videos, see `alignment.pairs.choose`.

    candidates  K, videos per prompt
    min_margin  the winner must be better by this, in standard deviations; 0 asks for more than a tie
    agreement   drop pairs whose loser some reward prefers
    """

    candidates: int = 8
    min_margin: float = 0.0
    agreement: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.candidates < 2:
            problems.append(f"candidates must be at least 2, got {self.candidates}")
        if not self.min_margin >= 0:
            problems.append(f"min_margin must be at least 0, got {self.min_margin}")
        _check("PairConfig", problems)


@dataclass(frozen=True)
class DpoConfig:
    """Training on pairs. Defaults are Flow-DPO's (2501.13918, Table 10), with beta counted on errors that are means.

    method          "dpo"; "rwr", all videos weighted by exp(reward / temperature); "sft", the winners alone
    beta            how hard the policy is held to its reference; 100 to 5000 are in use
    beta_schedule   "constant", or "quadratic" beta (1 - sigma)^2, see `alignment.dpo_losses.beta_at`
    sft_weight      of the winner's error beside the DPO loss, which holds it back from rising; 0 for none
    temperature     of rwr, in standard deviations of the reward
    noise           how sigma is drawn: "uniform" in (0, 1), or "logit_normal", sigmoid of N(0, 1); then shifted
    noise_shift     sigma -> s sigma / (1 + (s - 1) sigma); 1 leaves it
    pairs_per_step  pairs of one optimizer step, over ALL ranks
    micro_batch     pairs at once: the transformer runs twice as many samples
    epochs          how often each pair is seen, 0.5 is every other one
    displacement_window  steps over which the mean change of the winner's error is watched
    stop_on_displacement  stop when the winner's error rises above the reference's over ``displacement_window`` steps: the policy runs
                    from the loser, not to the winner. Otherwise a warning, once
    """

    method: Literal["dpo", "rwr", "sft"] = "dpo"
    beta: float = 500.0
    beta_schedule: Literal["constant", "quadratic"] = "constant"
    sft_weight: float = 0.0
    temperature: float = 1.0
    noise: Literal["uniform", "logit_normal"] = "uniform"
    noise_shift: float = 1.0
    pairs_per_step: int = 64
    micro_batch: int = 1
    epochs: float = 1.0
    displacement_window: int = 20
    stop_on_displacement: bool = False

    def __post_init__(self) -> None:
        positive = (
            "beta",
            "temperature",
            "noise_shift",
            "pairs_per_step",
            "micro_batch",
            "epochs",
            "displacement_window",
        )
        problems = [
            f"{n} must be positive, got {getattr(self, n)}"
            for n in positive
            if not getattr(self, n) > 0
        ]
        if not self.sft_weight >= 0:
            problems.append(f"sft_weight must be at least 0, got {self.sft_weight}")
        if self.sft_weight > 0 and self.method != "dpo":
            problems.append(f"sft_weight goes with method dpo, got {self.method}")
        _check("DpoConfig", problems)


@dataclass(frozen=True)
class RewardConfig:
    """One reward plug-in; its name is its key in the run's ``rewards``.

    kind        a key of `alignment.rewards.REWARDS`, or what an installed package offers under the entry point group
                video_alignment.rewards; null takes the name, so ``rewards: {descore: {}}`` is enough
    target      path/to/file.py:name, a function or an object of your own, see `alignment.rewards.plugin`; instead of kind
    url         http://host:port of a reward server (launch/serve.py), kind "remote"
    weight      of its advantages in the sum; 0 scores and logs it without training on it: a held-out judge
    checkpoint  folder of its weights, for rewards that have some
    options     keyword arguments of its constructor
    """

    kind: str | None = None
    target: str | None = None
    url: str | None = None
    weight: float = 1.0
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.kind == "":
            problems.append("kind must be a name or null, got an empty string")
        if self.kind is not None and self.target is not None:
            problems.append(
                f"kind and target are two ways to name one reward, got {self.kind} and {self.target}"
            )
        if self.url is not None and (
            self.target is not None or self.kind not in (None, "remote")
        ):
            problems.append(
                f"url names a remote reward and goes with no other kind or target, got {self.url}"
            )
        if not math.isfinite(self.weight):
            problems.append(f"weight must be finite, got {self.weight}")
        _check("RewardConfig", problems)
