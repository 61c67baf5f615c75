"""The nouns that stages hand to each other, and the three Protocols that plug-ins fill.

Shape letters, one meaning everywhere, used as suffixes of tensor names::

    P  prompts on this rank      G  members of a group       B = P * G  (group-major)
    K  reward heads              L  text tokens              N  preference pairs
    C F H W  latent channels, frames, height, width
    T Y X    pixel frames, height, width (uint8 RGB, channel last)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.gaussian import Gaussian


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss that carries grad, and detached float metrics about it (``name -> value``, no stage prefix)."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One prompt's rollouts; what the members share is stored once (LongCat-Video 2510.22200, section 3.3.1).

    latent_CFHW  fp32, x at the start of the one stochastic step, THE SAME for all members
    next_GCFHW   fp32, x at its end, one per member
    sigma, sigma_next  noise level before and after the step, 1 >= sigma > sigma_next >= 0
    clean_GCFHW  fp32, x at sigma = 0, what `Generator.decode` takes
    log_prob_G   fp32, log-prob of each next under the policy that sampled it (see `common.gaussian.log_prob`)
    """

    prompt: str
    latent_CFHW: Tensor
    next_GCFHW: Tensor
    sigma: float
    sigma_next: float
    clean_GCFHW: Tensor
    log_prob_G: Tensor

    def __post_init__(self) -> None:
        want = tuple(self.latent_CFHW.shape)
        if len(want) != 4:
            raise ValueError(f"Group.latent_CFHW must have 4 dimensions, got shape {want}")
        for name in ("next_GCFHW", "clean_GCFHW"):
            got = tuple(getattr(self, name).shape)
            if got[1:] != want or got[:1] != tuple(self.next_GCFHW.shape[:1]):
                raise ValueError(f"Group.{name} must be (G, {', '.join(map(str, want))}), got {got}")
        if tuple(self.log_prob_G.shape) != (self.size,):
            raise ValueError(f"Group.log_prob_G must be ({self.size},), got {tuple(self.log_prob_G.shape)}")
        if not 1.0 >= self.sigma > self.sigma_next >= 0.0:
            raise ValueError(f"Group needs 1 >= sigma > sigma_next >= 0, got {self.sigma} and {self.sigma_next}")

    @property
    def size(self) -> int:
        """G, the number of members."""
        return self.next_GCFHW.shape[0]


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
            raise ValueError(f"Score.value_B must be (B,), got shape {tuple(self.value_B.shape)}")
        for name, part in self.parts.items():
            if part.shape != self.value_B.shape:
                want = tuple(self.value_B.shape)
                raise ValueError(f"Score.parts[{name!r}] has shape {tuple(part.shape)}, want {want}")
        if self.texts and len(self.texts) != len(self.value_B):
            raise ValueError(f"Score.texts has {len(self.texts)} entries for {len(self.value_B)} videos")


@runtime_checkable
class Generator(Protocol):
    """A video generator that can sample, say how likely a sample was, and how wrong its velocity is."""

    module: nn.Module  # what deepspeed wraps; its trainable parameters are what the optimizer sees

    def rollout(self, prompts: Sequence[str], *, group_size: int, seeds: Sequence[int]) -> list[Group]:
        """One Group per prompt; ``seeds[p]`` decides everything random about it. No grad."""
        ...

    def transition(self, group: Group) -> Gaussian:
        """Law of ``next`` given ``latent``: mean (1, C, F, H, W), one forward per group, grad through the mean."""
        ...

    def member_transition(self, group: Group, member: int) -> Gaussian:
        """The same law computed by a forward of its own for one member (the plain path, for proofs)."""
        ...

    def flow_error(self, clean_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """MEAN squared velocity error per element of the batch, (B,). Grad."""
        ...

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """uint8 video (B, T, Y, X, 3) on the CPU. No grad."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the generator is the frozen reference (adapter off). Use under no_grad only."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Anything that judges videos. Frames come as uint8 on the CPU, (B, T, Y, X, 3), at `fps` frames a second."""

    name: str

    def score(self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float) -> Score: ...


@runtime_checkable
class Engine(Protocol):
    """deepspeed's two calls; tests pass a ten-line stand-in."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...
