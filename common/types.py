"""The nouns that stages hand to each other, and the three Protocols that plug-ins fill.

Shape letters, one meaning everywhere, used as suffixes of tensor names::

    P  prompts on this rank      G  members of a group       B = P * G  (group-major)
    K  reward heads              L  text tokens              N  preference pairs
    C F H W  latent channels, frames, height, width
    T Y X    pixel frames, height, width (uint8 RGB, channel last)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.gaussian import Gaussian


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss that carries grad, and detached float metrics about it (``name -> value``, no stage prefix)."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One stochastic step of a group: where each member came from and where it went.

    latent_MCFHW  fp32, x at the start. M = 1 when all members share it, which LongCat-Video (2510.22200, section 3.3.1)
                  arranges; else M = G
    next_GCFHW    fp32, x at the end, one per member
    sigma, sigma_next  noise level before and after, 1 >= sigma > sigma_next >= 0
    log_prob_G    fp32, of each next under the policy that sampled it (see `common.gaussian.log_prob`)
    std, gain     of the step: its noise, and how far its mean follows the velocity, d mean / d v = -gain
    """

    latent_MCFHW: Tensor
    next_GCFHW: Tensor
    sigma: float
    sigma_next: float
    log_prob_G: Tensor
    std: float
    gain: float

    def __post_init__(self) -> None:
        if self.next_GCFHW.dim() != 5:
            raise ValueError(
                f"Step.next_GCFHW must have 5 dimensions, got {tuple(self.next_GCFHW.shape)}"
            )
        size, *latent = self.next_GCFHW.shape
        got = tuple(self.latent_MCFHW.shape)
        if got not in ((1, *latent), (size, *latent)):
            raise ValueError(
                f"Step.latent_MCFHW must be (1 or {size}, {', '.join(map(str, latent))}), got {got}"
            )
        if tuple(self.log_prob_G.shape) != (size,):
            raise ValueError(
                f"Step.log_prob_G must be ({size},), got {tuple(self.log_prob_G.shape)}"
            )
        if not 1.0 >= self.sigma > self.sigma_next >= 0.0:
            raise ValueError(
                f"Step needs 1 >= sigma > sigma_next >= 0, got {self.sigma} and {self.sigma_next}"
            )

    @property
    def size(self) -> int:
        """G, the number of members."""
        return self.next_GCFHW.shape[0]

    def start_of(self, member: int) -> Tensor:
        """x of one member at the start, (1, C, F, H, W). IndexError if there is no such member."""
        if not 0 <= member < self.size:
            raise IndexError(f"member must be in 0..{self.size - 1}, got {member}")
        return (
            self.latent_MCFHW
            if len(self.latent_MCFHW) == 1
            else self.latent_MCFHW[member : member + 1]
        )


@dataclass(frozen=True)
class Group:
    """One prompt's rollouts.

    steps        the stochastic ones, in the order they were taken; what lies between is deterministic
    clean_GCFHW  fp32, x at sigma = 0, what `Generator.decode` takes
    """

    prompt: str
    steps: tuple[Step, ...]
    clean_GCFHW: Tensor

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(
                "Group.steps is empty: nothing would tell the members apart"
            )
        want = tuple(self.clean_GCFHW.shape)
        for step in self.steps:
            if tuple(step.next_GCFHW.shape) != want:
                raise ValueError(
                    f"Group.clean_GCFHW is {want}, a step's next {tuple(step.next_GCFHW.shape)}"
                )

    @property
    def size(self) -> int:
        """G, the number of members."""
        return self.clean_GCFHW.shape[0]


@dataclass(frozen=True)
class Score:
    """What a reward model says of a batch of videos: higher is better, NaN means "could not judge", never 0.

    value_B  fp32 (B,), on the CPU
    parts    optional further (B,) tensors by name, logged beside the value (sub-dimensions, say)
    texts    optional, one string per video (a chain of thought), shown in the report
    """

    value_B: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.value_B.dim() != 1:
            raise ValueError(
                f"Score.value_B must be (B,), got shape {tuple(self.value_B.shape)}"
            )
        for name, part in self.parts.items():
            if part.shape != self.value_B.shape:
                want = tuple(self.value_B.shape)
                raise ValueError(
                    f"Score.parts[{name!r}] has shape {tuple(part.shape)}, want {want}"
                )
        if self.texts and len(self.texts) != len(self.value_B):
            raise ValueError(
                f"Score.texts has {len(self.texts)} entries for {len(self.value_B)} videos"
            )

    @staticmethod
    def concat(scores: Sequence[Score]) -> Score:
        """Of all their videos, in order. A part that some of them lack is NaN there, a text is empty."""
        import torch

        names = dict.fromkeys(name for score in scores for name in score.parts)
        parts = {
            name: torch.cat(
                [
                    score.parts.get(name, torch.full_like(score.value_B, math.nan))
                    for score in scores
                ]
            )
            for name in names
        }
        texts: list[str] = []
        if any(score.texts for score in scores):
            texts = [
                text
                for score in scores
                for text in score.texts or [""] * len(score.value_B)
            ]
        return Score(torch.cat([score.value_B for score in scores]), parts, texts)

    def take(self, places: Sequence[int]) -> Score:
        """Of these videos, in this order."""
        rows = list(places)
        texts = [self.texts[i] for i in rows] if self.texts else []
        return Score(
            self.value_B[rows],
            {name: part_B[rows] for name, part_B in self.parts.items()},
            texts,
        )

    @staticmethod
    def placed(count: int, parts: Iterable[tuple[Sequence[int], Score]]) -> Score:
        """Scores of some places each -> of all ``count``, NaN where nobody judged."""
        import torch

        found = list(parts)
        order = [i for places, _ in found for i in places]
        missing = sorted(set(range(count)) - set(order))
        nobody = Score(torch.full((len(missing),), math.nan))
        whole = Score.concat(
            [*(score for _, score in found), *([nobody] if missing else [])]
        )
        return whole.take(torch.tensor(order + missing).argsort().tolist())


class RewardUnavailableError(RuntimeError):
    """A reward cannot be asked for now, such as one whose server went away. Nothing is wrong with the run: it may stop
    with a checkpoint and go on from there.
    """


def json_number(value: Any) -> float | None:
    """A score for JSON, which has no NaN: None where there is no finite number."""
    number = float(value)
    return number if math.isfinite(number) else None


@runtime_checkable
class Generator(Protocol):
    """A video generator that can sample, say how likely a sample was, and how wrong its velocity is."""

    module: (
        nn.Module
    )  # what deepspeed wraps; its trainable parameters are what the optimizer sees

    def rollout(
        self,
        prompts: Sequence[str],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        """One Group per prompt; ``seeds[p]`` decides everything random about it, ``iteration`` (the training step's
        number) what a schedule moves. No grad.

        first_member  number of the first, where other ranks hold the rest of these groups: member m of a seed is the
                      same whoever computes it
        """
        ...

    def transition(
        self, prompt: str, step: Step, member: int | None = None
    ) -> Gaussian:
        """Law of ``step.next`` given ``step.latent``: mean (M, C, F, H, W), ONE forward, grad through the mean.

        member  of one member alone, by a forward of its own: mean (1, C, F, H, W)
        """
        ...

    def flow_error(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        """MEAN squared velocity error per element of the batch, (B,). Grad."""
        ...

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """uint8 video (B, T, Y, X, 3) on the CPU. No grad."""
        ...

    def given_prompts(
        self, embedding_LD: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Inside, these prompts are known by embeddings computed elsewhere, (L, D) each without padding."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the generator is the frozen reference (adapter off). Use under no_grad only."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Anything that judges videos. Frames come as uint8 on the CPU, (B, T, Y, X, 3), at `fps` frames a second."""

    name: str

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score: ...


@runtime_checkable
class Engine(Protocol):
    """deepspeed's two calls; tests pass a ten-line stand-in. An update whose gradient is not finite is not made."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...
