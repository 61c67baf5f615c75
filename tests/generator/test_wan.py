"""WanGenerator on a tiny Wan equals the stock pipeline and plain per-member gradients."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from common.gaussian import Gaussian, log_prob
from common.types import Generator, Group
from generator.config import LoraConfig, SamplerConfig
from generator.denoiser import Denoiser, Expert
from generator.flow import guide
from generator.sampler import initial_noise
from generator.wan import WanGenerator
from tests.tiny import (
    FRAMES,
    HEIGHT,
    MAX_LENGTH,
    WIDTH,
    stochastic_step,
    tiny_config,
    tiny_generator,
)

PROMPT = "a red circle"
GUIDED = SamplerConfig(num_steps=6, stochastic_range=3, guidance_scale=3.0)


class OwnGrid(FlowMatchEulerDiscreteScheduler):
    """The stock Euler scheduler on sigma = 3 u / (1 + 2 u), u = 1 - i / N."""

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        u = [1 - i / num_inference_steps for i in range(num_inference_steps + 1)]
        self.sigmas = torch.tensor([3 * x / (1 + 2 * x) for x in u])
        self.timesteps = 1000 * self.sigmas[:-1]


def stock_latents(
    folder: Path, noise: Tensor, prompts: list[str], *, euler: bool, scale: float = 3.0
) -> Tensor:
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if euler:
        pipeline.scheduler = OwnGrid(shift=3.0)
    size = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "max_sequence_length": MAX_LENGTH,
    }
    size |= {"num_inference_steps": 6, "guidance_scale": scale}
    return pipeline(prompts, latents=noise, output_type="latent", **size).frames


@pytest.fixture(scope="module")
def generator(folder: Path) -> WanGenerator:
    """As if trained: the adapter's B is random."""
    return tiny_generator(folder)


@pytest.fixture(scope="module")
def group(generator: WanGenerator) -> Group:
    return generator.rollout([PROMPT], group_size=4, seeds=[3])[0]


@pytest.fixture
def count(generator: WanGenerator) -> Iterator[Callable[[], int]]:
    """DiT sample-forwards since the last call."""
    seen: list[int] = []
    base = generator.module.get_base_model()
    hook = base.register_forward_hook(lambda _, __, out: seen.append(len(out[0])))

    def total() -> int:
        result = sum(seen)
        seen.clear()
        return result

    yield total
    hook.remove()


def test_fills_the_protocol(generator: WanGenerator) -> None:
    assert isinstance(generator, Generator)


def test_tiny_model_depends_on_prompt_and_timestep(generator: WanGenerator) -> None:
    """Else every comparison below would pass with the prompt or the timestep ignored."""
    x = initial_noise(0, generator.latent_shape).unsqueeze(0)
    with torch.no_grad():
        v = generator.velocity(x, torch.tensor([0.7]), [PROMPT], guidance_scale=1.0)
        other_prompt = generator.velocity(
            x, torch.tensor([0.7]), ["rain"], guidance_scale=1.0
        )
        other_sigma = generator.velocity(
            x, torch.tensor([0.6]), [PROMPT], guidance_scale=1.0
        )
    assert (other_prompt - v).std() > 0.05 * v.std()
    assert (other_sigma - v).std() > 0.05 * v.std()


# ---- against the stock pipeline ----


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_zero_noise_rollout_is_the_stock_pipeline(folder: Path, scale: float) -> None:
    sampler = dataclasses.replace(GUIDED, noise_level=0.0, guidance_scale=scale)
    generator = WanGenerator.load(tiny_config(folder, sampler=sampler), device="cpu")
    seeds = [
        next(seed for seed in range(50) if stochastic_step(seed, 3) == k)
        for k in range(3)
    ]
    groups = generator.rollout([PROMPT] * 3, group_size=2, seeds=seeds)
    for seed, group in zip(seeds, groups, strict=True):
        noise = initial_noise(seed, generator.latent_shape).unsqueeze(0)
        stock = stock_latents(folder, noise, [PROMPT], euler=True, scale=scale)
        assert (group.clean_GCFHW - stock).abs().max() < 1e-5 * stock.abs().max()
    assert len({group.steps[0].sigma for group in groups}) == 3


@pytest.mark.parametrize("kind", ["euler", "pipeline"])
def test_sample_is_the_stock_pipeline(folder: Path, kind: str) -> None:
    generator = WanGenerator.load(tiny_config(folder, rollout_batch=2), device="cpu")
    prompts, seeds = [PROMPT, "rain", "two cats"], [1, 2, 3]
    noise = torch.stack([initial_noise(seed, generator.latent_shape) for seed in seeds])
    stock = stock_latents(folder, noise, prompts, euler=kind == "euler")
    got = generator.sample(prompts, seeds, scheduler=kind)
    assert (got - stock).abs().max() < 1e-5 * stock.abs().max()
    assert torch.equal(generator.sample(prompts, seeds, scheduler=kind), got)


def test_sample_with_another_guidance_is_the_stock_pipeline_with_it(
    folder: Path,
) -> None:
    """A sampler of 3.0, asked for 1 and 5; by itself it stays at 3."""
    generator = WanGenerator.load(tiny_config(folder), device="cpu")
    noise = initial_noise(1, generator.latent_shape)[None]
    for scale in (1.0, 5.0):
        got = generator.sample([PROMPT], [1], guidance_scale=scale)
        want = stock_latents(folder, noise, [PROMPT], euler=True, scale=scale)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        assert (got - generator.sample([PROMPT], [1])).abs().max() > 1e-3
    again = generator.sample([PROMPT], [1], guidance_scale=3.0)
    assert torch.equal(again, generator.sample([PROMPT], [1]))
    with pytest.raises(ValueError, match="guidance_scale=5"):
        generator.sample([PROMPT], [1], scheduler="pipeline", guidance_scale=5.0)


def test_sample_needs_one_seed_per_prompt(generator: WanGenerator) -> None:
    with pytest.raises(ValueError, match=r"\b2\b"):
        generator.sample(["a", "b"], [1])
    with pytest.raises(ValueError, match="'unipc'"):
        generator.sample(["a"], [1], scheduler="unipc")


def test_guidance_mixes_in_fp32(folder: Path) -> None:
    """Mixing in bf16 would lose bits that the guidance scale then amplifies."""
    generator = tiny_generator(folder, dtype="bfloat16")
    x = initial_noise(0, generator.latent_shape).unsqueeze(0)
    seen: list[Tensor] = []
    hook = generator.module.get_base_model().register_forward_hook(
        lambda _, __, out: seen.append(out[0])
    )
    with torch.no_grad():
        v = generator.velocity(x, torch.tensor([0.7]), [PROMPT], guidance_scale=3.0)
    hook.remove()
    assert seen[0].dtype == torch.bfloat16
    cond, uncond = seen[0].double().chunk(2)
    assert v.dtype == torch.float32
    assert torch.allclose(
        v.double(), uncond + 3.0 * (cond - uncond), rtol=1e-6, atol=1e-6
    )
    assert not torch.equal(v, guide(cond, uncond, 3.0).bfloat16().float())


def test_timestep_is_not_rounded(generator: WanGenerator) -> None:
    seen: list[Tensor] = []

    def keep(_: object, __: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["timestep"])

    hook = generator.module.get_base_model().register_forward_pre_hook(
        keep, with_kwargs=True
    )
    x = torch.zeros(2, *generator.latent_shape)
    with torch.no_grad():
        generator.velocity(
            x, torch.tensor([0.95454545, 0.1234567]), ["a", "b"], guidance_scale=1.0
        )
    hook.remove()
    assert seen[0].tolist() == pytest.approx([954.54545, 123.4567], rel=1e-7)


def law_of(generator: WanGenerator, group: Group) -> Gaussian:
    (step,) = group.steps
    return generator.transition(group.prompt, step)


def log_probs(generator: WanGenerator, group: Group) -> Tensor:
    return log_prob(law_of(generator, group), group.steps[0].next_GCFHW)


# ---- what it costs ----


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_forwards_per_group(
    generator: WanGenerator, count: Callable[[], int], seed: int
) -> None:
    k = stochastic_step(seed, 3)
    group = generator.rollout([PROMPT], group_size=4, seeds=[seed])[0]
    assert count() == 2 * ((k + 1) + 4 * (6 - k - 1))
    law_of(generator, group)
    assert count() == 2
    with torch.no_grad(), generator.reference():
        law_of(generator, group)
    assert count() == 2


def test_a_sharded_module_is_called_as_often_as_on_the_busiest_rank(
    generator: WanGenerator, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = generator.rollout([PROMPT], group_size=2, seeds=[3])[0]
    forwards = count()
    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(generator, "sharded", True, raising=False)
    monkeypatch.setattr(
        "generator.wan.max_over_ranks",
        lambda calls: asked.append((calls, count())) or calls + 3.0,
    )
    together = generator.rollout([PROMPT], group_size=2, seeds=[3])[0]
    assert count() == forwards + 3  # unguided, and nobody sees what comes out
    assert (
        asked == [(6, 0)]
    )  # both members go in one batch: T calls; asked before the first, when all ranks are there
    assert torch.equal(together.clean_GCFHW, alone.clean_GCFHW)


def test_forwards_without_guidance(folder: Path) -> None:
    for changes, rollout, update in (
        ({"sampler": dataclasses.replace(GUIDED, guidance_scale=1.0)}, 1, 1),
        ({"guidance_in_update": False}, 2, 1),
    ):
        generator = tiny_generator(folder, **changes)
        seen: list[int] = []
        generator.module.get_base_model().register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(len(out[0]))
        )
        group = generator.rollout([PROMPT], group_size=2, seeds=[1])[0]
        k = stochastic_step(1, 3)
        assert sum(seen) == rollout * ((k + 1) + 2 * (6 - k - 1))
        seen.clear()
        law_of(generator, group)
        assert sum(seen) == update


# ---- likelihood ----


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_first_ratio_is_one(folder: Path, changes: dict[str, object]) -> None:
    generator = tiny_generator(folder, **changes)
    for group in generator.rollout([PROMPT, "rain"], group_size=3, seeds=[1, 2]):
        law = law_of(generator, group)
        assert law.mean.shape == (1, *generator.latent_shape)
        assert law.mean.requires_grad
        assert torch.equal(
            log_prob(law, group.steps[0].next_GCFHW).detach(), group.steps[0].log_prob_G
        )


def test_module_stays_in_eval_mode(generator: WanGenerator, group: Group) -> None:
    generator.module.train()
    law_of(generator, group)
    assert not any(module.training for module in generator.module.modules())


def gradients(generator: WanGenerator, loss: Tensor) -> Tensor:
    parameters = [p for p in generator.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def collapsed_and_plain(generator: WanGenerator, group: Group) -> tuple[Tensor, Tensor]:
    """MEAN of A_g exp(logp_g - old_g): one forward for all members equals one for each."""
    advantage_G = torch.tensor([1.5, -0.5, 0.25, -1.25]).to(group.clean_GCFHW.dtype)
    law = law_of(generator, group)
    ratio_G = (
        log_prob(law, group.steps[0].next_GCFHW) - group.steps[0].log_prob_G
    ).exp()
    collapsed = gradients(generator, -(advantage_G * ratio_G).mean())
    plain = torch.zeros_like(collapsed)
    for g in range(4):
        own = log_prob(
            law_of(generator, group),
            group.steps[0].next_GCFHW[g : g + 1],
        )[0]
        plain += gradients(
            generator, -advantage_G[g] * (own - group.steps[0].log_prob_G[g]).exp() / 4
        )
    return collapsed, plain


def test_collapsed_gradient_is_the_plain_one(
    generator: WanGenerator, group: Group
) -> None:
    collapsed, plain = collapsed_and_plain(generator, group)
    assert plain.norm() > 0
    assert (collapsed - plain).norm() < 1e-6 * plain.norm()


def test_collapsed_gradient_is_the_plain_one_in_fp64(
    generator: WanGenerator, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan narrows to fp32 in its blocks with Tensor.float(), which is switched off here."""
    double = copy.copy(generator)
    double.module = copy.deepcopy(generator.module).double()
    expert = Expert(double.module, double.module.get_base_model())
    double._policy = Denoiser([expert], generator.device)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (step,) = group.steps
    tensors = ("latent_MCFHW", "next_GCFHW", "log_prob_G")
    step = dataclasses.replace(
        step, **{name: getattr(step, name).double() for name in tensors}
    )
    wide = dataclasses.replace(
        group, steps=(step,), clean_GCFHW=group.clean_GCFHW.double()
    )
    collapsed, plain = collapsed_and_plain(double, wide)
    assert collapsed.dtype == torch.float64
    assert (collapsed - plain).norm() < 1e-12 * plain.norm()
    single, _ = collapsed_and_plain(generator, group)
    assert (collapsed - single).norm() > 1e-9 * plain.norm()  # it did compute in fp64


def test_gradient_checkpointing_changes_no_gradient(folder: Path, group: Group) -> None:
    plain, recomputed = (
        tiny_generator(folder, gradient_checkpointing=on) for on in (False, True)
    )
    want = gradients(plain, log_probs(plain, group).sum())
    got = gradients(recomputed, log_probs(recomputed, group).sum())
    assert (got - want).norm() < 1e-6 * want.norm()


def test_group_depends_on_its_prompt_and_seed_alone(generator: WanGenerator) -> None:
    there = generator.rollout(["rain", PROMPT], group_size=3, seeds=[5, 6])
    back = generator.rollout([PROMPT, "rain"], group_size=3, seeds=[6, 5])
    for one, two in zip(there, reversed(back), strict=True):
        assert one.prompt == two.prompt
        assert torch.equal(one.clean_GCFHW, two.clean_GCFHW)
        for name in ("latent_MCFHW", "next_GCFHW", "log_prob_G"):
            assert torch.equal(getattr(one.steps[0], name), getattr(two.steps[0], name))
    same_seed = generator.rollout(["rain", PROMPT], group_size=3, seeds=[5, 5])
    assert same_seed[0].steps[0].sigma == same_seed[1].steps[0].sigma
    assert not torch.allclose(
        same_seed[0].clean_GCFHW, same_seed[1].clean_GCFHW, atol=1e-2
    )


def test_flow_error_by_hand(generator: WanGenerator) -> None:
    """mean |v(x_sigma) - (eps - x0)|^2 with x_sigma = (1 - sigma) x0 + sigma eps."""
    draw = torch.Generator().manual_seed(8)
    clean, noise = (
        torch.randn(2, *generator.latent_shape, generator=draw) for _ in range(2)
    )
    sigma = torch.tensor([0.25, 0.8])
    got = generator.flow_error(clean, noise, sigma, [PROMPT, "rain"])
    texts = generator.prompts.get(
        [PROMPT, "rain"], device=torch.device("cpu"), dtype=torch.float32
    )
    base = generator.module.get_base_model()
    for i, s in enumerate((0.25, 0.8)):
        x = (1 - s) * clean[i : i + 1] + s * noise[i : i + 1]
        with torch.no_grad():
            v = base(x, torch.tensor([1000 * s]), texts[i : i + 1]).sample
        want = np.mean(
            (v.numpy() - (noise[i] - clean[i]).numpy()) ** 2, dtype=np.float64
        )
        assert got[i].item() == pytest.approx(want, rel=1e-5)
    assert gradients(generator, got.sum()).norm() > 0


def test_flow_velocity_has_the_guidance_of_the_rollout(
    generator: WanGenerator,
) -> None:
    """u + 3 (c - u) from the two branches; without guidance it is the error's velocity."""
    draw = torch.Generator().manual_seed(8)
    clean, noise = (
        torch.randn(2, *generator.latent_shape, generator=draw) for _ in range(2)
    )
    sigma = torch.tensor([0.25, 0.8])
    prompts = [PROMPT, "rain"]
    negative = [generator.cfg.sampler.negative_prompt] * 2
    with torch.no_grad():
        guided = generator.flow_velocity(clean, noise, sigma, prompts)
        c = generator.flow_velocity(clean, noise, sigma, prompts, guided=False)
        u = generator.flow_velocity(clean, noise, sigma, negative, guided=False)
        error = generator.flow_error(clean, noise, sigma, prompts)
    assert generator.cfg.sampler.guidance_scale == 3.0
    torch.testing.assert_close(guided, u + 3.0 * (c - u), rtol=1e-4, atol=1e-5)
    want = (c - (noise - clean)).square().flatten(1).mean(1)
    torch.testing.assert_close(error, want)


# ---- reference ----


def test_reference_is_the_model_without_its_adapter(
    folder: Path, generator: WanGenerator, group: Group
) -> None:
    untouched = WanGenerator.load(tiny_config(folder), device="cpu")  # B = 0
    with torch.no_grad():
        base = law_of(untouched, group).mean
        policy = law_of(generator, group).mean
        with generator.reference(), generator.reference():
            reference = law_of(generator, group).mean
        after = law_of(generator, group).mean
    assert torch.allclose(reference, base, atol=1e-6)
    assert (policy - base).abs().max() > 1e-3
    assert torch.equal(after, policy)


def test_reference_between_forward_and_backward_changes_no_gradient(
    folder: Path, group: Group
) -> None:
    generator = tiny_generator(folder, gradient_checkpointing=True)
    want = gradients(generator, log_probs(generator, group).sum())
    loss = log_probs(generator, group).sum()
    with torch.no_grad(), generator.reference():
        law_of(generator, group)
    assert torch.equal(gradients(generator, loss), want)


def test_reference_refuses_grad(generator: WanGenerator, group: Group) -> None:
    with generator.reference(), pytest.raises(RuntimeError, match="no_grad"):
        law_of(generator, group)
    law_of(generator, group)  # and the context closes behind the error


def test_full_fine_tuning_keeps_a_frozen_copy(folder: Path, group: Group) -> None:
    generator = WanGenerator.load(tiny_config(folder, lora=None), device="cpu")
    with torch.no_grad():
        base = law_of(generator, group).mean
        for parameter in generator.module.parameters():
            assert parameter.requires_grad
            parameter.add_(0.05)
        moved = law_of(generator, group).mean
        with generator.reference():
            reference = law_of(generator, group).mean
    assert torch.equal(reference, base)
    assert (moved - base).abs().max() > 1e-3


def test_freed_text_encoder_serves_known_prompts(folder: Path) -> None:
    generator = WanGenerator.load(
        tiny_config(folder, lora=LoraConfig(rank=2, alpha=2.0)), device="cpu"
    )
    generator.prompts.encode([PROMPT])
    generator.free_text_encoder()  # which caches the negative prompt first
    want = WanGenerator.load(generator.cfg, device="cpu").sample([PROMPT], [1])
    assert torch.equal(generator.sample([PROMPT], [1]), want)
    generator.sample([PROMPT], [1], scheduler="pipeline")
    with pytest.raises(RuntimeError, match="freed"):
        generator.sample(["snow"], [1])


def test_missing_model_folder_raises(folder: Path) -> None:
    for path, words in (
        ("./nowhere", "./nowhere"),
        ("assets/no/wan", "assets/no/wan"),
        (
            "nowhere/wan",
            "nowhere/wan",
        ),
        (str(folder / "vae"), "model_index.json"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            WanGenerator.load(tiny_config(Path("x"), path=path), device="cpu")
