"""Records that stages exchange, and the Protocols Generator, RewardModel and Engine.

Shape letters have the same meaning everywhere, as suffixes of tensor names::

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
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.gaussian import Gaussian


@dataclass(frozen=True)
class ImagePrompt:
    """A text, and the image that the video begins with.

    image  path of its file
    """

    text: str
    image: str


Prompt: TypeAlias = str | ImagePrompt


def text_of(prompt: Prompt) -> str:
    """The text of a prompt, which rewards read."""
    return prompt.text if isinstance(prompt, ImagePrompt) else prompt


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss with gradient, and detached float metrics by name, without stage prefix."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A stochastic step of a group: where each member came from and where it went.

    latent_MCFHW  fp32, x at the start; M = 1 when all members share it, as LongCat-Video
                  (2510.22200, section 3.3.1) arranges, otherwise M = G
    next_GCFHW    fp32, x at the end of every member
    sigma, sigma_next  noise levels before and after, 1 >= sigma > sigma_next >= 0
    log_prob_G    fp32, log-prob of each next under the policy that sampled it, see
                  `common.gaussian.log_prob`
    std, gain     the step's noise, and how far its mean follows the velocity: d mean / d v = -gain
    mean_MCFHW    fp32, mean of the transition that sampled, with the M of latent; None where a
                  generator does not record it. Several updates on a rollout need it
    """

    latent_MCFHW: Tensor
    next_GCFHW: Tensor
    sigma: float
    sigma_next: float
    log_prob_G: Tensor
    std: float
    gain: float
    mean_MCFHW: Tensor | None = None

    def __post_init__(self) -> None:
        # The end of the step sets the shape of all.
        shape = tuple(self.next_GCFHW.shape)
        if len(shape) != 5:
            raise ValueError(f"Step.next_GCFHW must have 5 dimensions, got {shape}")
        # shared by all members, or one latent per member
        start = tuple(self.latent_MCFHW.shape)
        if start not in ((1, *shape[1:]), shape):
            raise ValueError(
                f"Step.latent_MCFHW must be {shape}, or 1 in front, got {start}"
            )
        if self.mean_MCFHW is not None and tuple(self.mean_MCFHW.shape) != start:
            raise ValueError(
                f"Step.mean_MCFHW must be {start}, got {tuple(self.mean_MCFHW.shape)}"
            )
        if tuple(self.log_prob_G.shape) != shape[:1]:
            raise ValueError(
                f"Step.log_prob_G must be ({shape[0]},), got {tuple(self.log_prob_G.shape)}"
            )
        if not 1.0 >= self.sigma > self.sigma_next >= 0.0:
            raise ValueError(
                f"Step needs 1 >= sigma > sigma_next >= 0, got {self.sigma} and {self.sigma_next}"
            )

    @property
    def size(self) -> int:
        """G, the number of members."""
        return self.next_GCFHW.shape[0]


@dataclass(frozen=True)
class Group:
    """The rollouts of a prompt.

    steps        stochastic steps in order; all other steps are deterministic
    clean_GCFHW  fp32, x at sigma = 0, the input of `Generator.decode`; where the first latent frame
                 of a video is given, it is in front here, and steps have the others
    deterministic  there is no stochastic step, which only forward objectives allow
    """

    prompt: Prompt
    steps: tuple[Step, ...]
    clean_GCFHW: Tensor
    deterministic: bool = False

    def __post_init__(self) -> None:
        # Some step must have a density, unless the sampler says that none has.
        if not self.steps and not self.deterministic:
            raise ValueError("Group.steps is empty: a group needs a stochastic step")
        # every step has all members
        want = tuple(self.clean_GCFHW.shape)
        given = (*want[:2], want[2] - 1, *want[3:])
        for step in self.steps:
            if tuple(step.next_GCFHW.shape) not in (want, given):
                raise ValueError(
                    f"Group.clean_GCFHW is {want}, a step's next {tuple(step.next_GCFHW.shape)}"
                )

    @property
    def size(self) -> int:
        """G, the number of members."""
        return self.clean_GCFHW.shape[0]


@dataclass(frozen=True)
class Score:
    """A reward model's scores of a batch of videos: higher is better, NaN means no score.

    value_B  fp32 (B,), on the CPU
    parts    optional (B,) tensors by name, logged with the value (sub-dimensions, for example)
    texts    optional, a string per video (a chain of thought), shown in the report
    reasons  optional, why each video has no score; empty for a video that has one
    """

    value_B: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Sequence[str] = ()
    reasons: Sequence[str] = ()

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
        count = len(self.value_B)
        for name, entries in (("texts", self.texts), ("reasons", self.reasons)):
            if entries and len(entries) != count:
                raise ValueError(
                    f"Score.{name} has {len(entries)} entries for {count} videos"
                )

    @staticmethod
    def concat(scores: Sequence[Score]) -> Score:
        """Join scores in order; a part that a score lacks is NaN there, a text or reason empty."""
        import torch

        # names in the order they appear
        parts = {}
        for name in dict.fromkeys(name for score in scores for name in score.parts):
            columns = []
            for score in scores:
                missing_B = torch.full_like(score.value_B, math.nan)
                columns.append(score.parts.get(name, missing_B))
            parts[name] = torch.cat(columns)

        # texts and reasons, unless no score has them
        texts: list[str] = []
        reasons: list[str] = []
        for score in scores:
            empty = [""] * len(score.value_B)
            texts += score.texts or empty
            reasons += score.reasons or empty
        return Score(
            torch.cat([score.value_B for score in scores]),
            parts,
            texts if any(score.texts for score in scores) else (),
            reasons if any(reasons) else (),
        )

    def reason(self, index: int) -> str:
        """Why a video has no finite score; empty for a video that has one."""
        value = float(self.value_B[index])
        if math.isfinite(value):
            return ""
        given = self.reasons[index] if self.reasons else ""
        return given or f"the score is {value:g}"

    def take(self, places: Sequence[int]) -> Score:
        """Select videos, in the given order."""
        # places may be any sequence, tensors index by lists
        rows = list(places)
        texts = [self.texts[i] for i in rows] if self.texts else []
        reasons = [self.reasons[i] for i in rows] if self.reasons else []
        parts = {name: part_B[rows] for name, part_B in self.parts.items()}
        return Score(self.value_B[rows], parts, texts, reasons)

    @staticmethod
    def placed(count: int, parts: Iterable[tuple[Sequence[int], Score]]) -> Score:
        """Put scores at their places among ``count`` videos, NaN at places without a score."""
        import torch

        # Scores in the order they come, and the places they belong to.
        order: list[int] = []
        scores = []
        for places, score in parts:
            order += places
            scores.append(score)
        # the rest gets NaN
        missing = sorted(set(range(count)) - set(order))
        if missing:
            scores.append(Score(torch.full((len(missing),), math.nan)))
        return Score.concat(scores).take(
            torch.tensor(order + missing).argsort().tolist()
        )


class RewardUnavailableError(RuntimeError):
    """A reward is not available now, for example because its server is down.

    The run itself is in order: it may stop with a checkpoint and be resumed.
    """


def json_number(value: Any) -> float | None:
    """Convert a score for JSON, which has no NaN: None unless it is a finite number."""
    # Tensors and numpy numbers have no JSON form.
    number = float(value)
    return number if math.isfinite(number) else None


@runtime_checkable
class Generator(Protocol):
    """A video generator: samples, transition densities, and velocity errors."""

    # deepspeed wraps this module, and the optimizer gets its trainable parameters
    module: nn.Module

    def rollout(
        self,
        prompts: Sequence[str],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        """Sample one Group per prompt, without gradient.

        ``seeds[p]`` decides all randomness of prompt p, ``iteration`` (the training step) what a
        schedule moves. ``first_member`` is the number of the first member, where other ranks have
        the rest of these groups: member m of a seed is the same on every rank.
        """
        ...

    def transition(self, prompt: str, step: Step) -> Gaussian:
        """Distribution of ``step.next`` given ``step.latent``, ONE forward, with gradient.

        Its mean is (M, C, F, H, W).
        """
        ...

    def flow_error(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[Prompt],
    ) -> Tensor:
        """Squared velocity error, MEAN over latent elements -> (B,), with gradient."""
        ...

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Decode to uint8 video (B, T, Y, X, 3) on the CPU, without gradient."""
        ...

    def given_prompts(
        self,
        embedding_LD: Mapping[str, Tensor],
        images: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> AbstractContextManager[None]:
        """Inside, use these precomputed embeddings, (L, D) each, without padding.

        images  {file: its tensors}, of prompts with images; not given where there are none
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the generator is the frozen reference policy; use it under no_grad only."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Scores videos: uint8 (B, T, Y, X, 3) on the CPU, at `fps` frames a second."""

    name: str

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score: ...


@runtime_checkable
class Engine(Protocol):
    """The two calls of a deepspeed engine; it skips an update with a non-finite gradient."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...
