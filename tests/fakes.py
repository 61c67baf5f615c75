"""A generator that can be solved on paper, short rewards and a plain engine."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common import gaussian
from common.memory import AdaptiveBatcher
from common.types import Group, Score, Step
from generator import flow, schedule
from generator.config import SamplerConfig
from generator.sampler import Members, Walk, ode, rollout_group

SHAPE = (3, 2, 4, 4)  # C F H W: a latent is a tiny RGB video


class Velocity(nn.Module):
    """The exact velocity of data N(0, spread^2) plus an adapter gain_C x + bias_C, at first 0."""

    def __init__(
        self, *, spread: float = 0.5, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.spread = spread
        self.adapter_on = True
        self.gain_C = nn.Parameter(torch.zeros(SHAPE[0], dtype=dtype))
        self.bias_C = nn.Parameter(torch.zeros(SHAPE[0], dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        """Return the velocity of x (B, C, F, H, W).

        For x_0 ~ N(0, s^2): v = x (sigma - (1 - sigma) s^2) / ((1 - sigma)^2 s^2 + sigma^2).
        """
        variance = (1 - sigma) ** 2 * self.spread**2 + sigma**2
        v = x * (sigma - (1 - sigma) * self.spread**2) / variance * self.frozen
        if self.adapter_on:
            v = v + self.gain_C.view(-1, 1, 1, 1) * x + self.bias_C.view(-1, 1, 1, 1)
        return v


class FakeGenerator:
    """The Generator protocol around `Velocity`, with the real flow, schedule and sampler."""

    def __init__(
        self,
        *,
        num_steps: int = 8,
        stochastic_range: int = 3,
        max_std: float | None = 0.45,
        dtype: torch.dtype = torch.float32,
        **sampler: object,
    ) -> None:
        self.module = Velocity(dtype=dtype)
        self.how = SamplerConfig(
            num_steps=num_steps,
            stochastic_range=stochastic_range,
            max_std=max_std,
            guidance_scale=1.0,
            **sampler,
        )
        self.sigmas = schedule.sigma_grid(num_steps, shift=3.0).tolist()
        self.kernel = flow.Kernel(self.how.kernel, self.how.noise_level, max_std)
        self.dtype, self.grad_forwards = dtype, 0
        self.asked: list[list[str]] = []
        self.known: set[str] = set()

    def rollout(
        self,
        prompts: Sequence[str],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        return [
            rollout_group(
                self.velocity,
                Members(prompt, seed, group_size, first_member),
                Walk(
                    shape=SHAPE,
                    sigmas=self.sigmas,
                    steps=schedule.stochastic_steps(
                        seed, self.how, iteration=iteration
                    ),
                    kernel=self.kernel,
                    shared_noise=self.how.initial_noise == "shared",
                    tail=lambda x, sigmas: ode(self.velocity, x, sigmas),
                ),
                batch=AdaptiveBatcher(None, what="latents"),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return self.module(x.to(self.dtype), sigma)

    def transition(self, prompt: str, step: Step) -> gaussian.Gaussian:
        x = step.latent_MCFHW
        self.grad_forwards += len(x) * torch.is_grad_enabled()
        x = x.to(self.dtype)
        return self.kernel.transition(
            x, self.module(x, step.sigma), step.sigma, step.sigma_next
        )

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Latent -1..1 is black..white: (B, C, F, H, W) -> (B, T, Y, X, 3)."""
        return (
            ((clean_BCFHW + 1) * 127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .permute(0, 2, 3, 4, 1)
        )

    def flow_error(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        self.asked.append(list(prompts))
        self.grad_forwards += len(prompts) * torch.is_grad_enabled()
        errors = []
        for clean, noise, sigma in zip(
            clean_BCFHW.to(self.dtype), noise_BCFHW.to(self.dtype), sigma_B, strict=True
        ):
            at = float(sigma)
            v = self.module(((1 - at) * clean + at * noise)[None], at)[0]
            errors.append((v - (noise - clean)).square().mean())
        return torch.stack(errors)

    def flow_velocity(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        self.grad_forwards += len(prompts) * torch.is_grad_enabled()
        x_BCFHW = flow.interpolate(
            clean_BCFHW.to(self.dtype), noise_BCFHW.to(self.dtype), sigma_B
        )
        rows = [
            self.module(x[None], float(sigma))
            for x, sigma in zip(x_BCFHW, sigma_B, strict=True)
        ]
        return torch.cat(rows)

    @contextmanager
    def given_prompts(self, embedding_LD: Mapping[str, Tensor]) -> Iterator[None]:
        self.known = set(embedding_LD)
        yield
        self.known = set()

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.module.adapter_on = False
        try:
            yield
        finally:
            self.module.adapter_on = True


class FunctionReward:
    """A reward from a function (video (T, Y, X, 3), prompt) -> number."""

    def __init__(self, name: str, function: Callable[[Tensor, str], float]) -> None:
        self.name, self.function = name, function
        self.calls = 0

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        self.calls += 1
        values = [
            self.function(video, prompt)
            for video, prompt in zip(video_BTYXC, prompts, strict=True)
        ]
        return Score(value_B=torch.tensor(values, dtype=torch.float32))


def redness(video_TYXC: Tensor, _: str) -> float:
    """MEAN red minus MEAN blue, of 255."""
    return (
        float(video_TYXC[..., 0].float().mean() - video_TYXC[..., 2].float().mean())
        / 255
    )


def prompt_length(_: Tensor, prompt: str) -> float:
    """Knows nothing of the video."""
    return float(len(prompt))


class Scripted:
    """A reward that gives out given numbers in order, NaN included."""

    def __init__(self, values: Sequence[float]) -> None:
        self.name, self.values = "scripted", list(values)

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        taken, self.values = self.values[: len(prompts)], self.values[len(prompts) :]
        return Score(value_B=torch.tensor(taken))


class PlainEngine:
    """An engine as deepspeed's: divide by the accumulation, step on the last backward."""

    def __init__(
        self,
        module: nn.Module,
        *,
        accumulation: int,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=weight_decay
        )
        self.accumulation, self.backwards, self.steps = accumulation, 0, 0
        self.last_gradient: list[Tensor] = []
        self.losses: list[float] = []

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()
        self.backwards += 1
        self.losses.append(float(loss.detach()))

    def step(self) -> None:
        if self.backwards % self.accumulation == 0:
            self.last_gradient = [p.grad.clone() for p in self.parameters]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def grad_norm(self) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in self.last_gradient))


_DECODER = """
import os, time
def serve(connection):
    connection.send_bytes(b"ready")
    while True:
        line, frames = connection.recv()
        trap = "trap" in line
        {body}
        connection.send_bytes(b"")
"""


def decoder_with_a_trap(
    folder: Path, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write a decoder that accepts each file and first runs ``body``; ``trap`` marks a name."""
    from rm import video_check

    (folder / "trap_decoder.py").write_text(_DECODER.format(body=body))
    # The decoder's process finds modules where this one does.
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "trap_decoder", raising=False)
    decoder = importlib.import_module("trap_decoder")
    monkeypatch.setattr(video_check, "serve", decoder.serve)
