"""AnyFlow as a policy: its jumps are the stock pipeline's, its one step has a density."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from common.gaussian import log_prob
from generator.anyflow import AnyFlowGenerator, load_generator
from generator.config import LoraConfig, SamplerConfig
from generator.family import Family
from generator.flow_map import from_wan, mean_velocity
from generator.pipeline import read_transformer
from generator.sampler import initial_noise
from generator.schedule import prefix_grid
from generator.stock_check import stock_gap
from generator.wan import WanGenerator
from tests.generator.families import build_anyflow, gap, sigmas_of
from tests.tiny import (
    FRAMES,
    HEIGHT,
    MAX_LENGTH,
    WIDTH,
    stochastic_step,
    tiny_config,
)

PROMPTS = ["a red circle", "rain"]


@pytest.fixture(scope="module")
def anyflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_anyflow(tmp_path_factory.mktemp("anyflow"))


def how(**changes: object) -> SamplerConfig:
    values = {"num_steps": 16, "shift": 5.0, "stochastic_range": 6}
    values |= {"guidance_scale": 1.0, "prefix_steps": 1, "tail_steps": 3}
    return SamplerConfig(**{**values, **changes})


def load(folder: Path, *, loud: bool = True, **changes: object) -> AnyFlowGenerator:
    """Load with a random B in each adapter."""
    values = {"sampler": how(), **changes}
    generator = load_generator(tiny_config(folder, **values), device="cpu")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in generator.module.named_parameters():
            if loud and ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return generator


def noise_of(generator: WanGenerator) -> Tensor:
    return torch.stack([initial_noise(seed, generator.latent_shape) for seed in (0, 1)])


def stock_latents(folder: Path, noise: Tensor, steps: int, lora: Path | None) -> Tensor:
    from diffusers import AnyFlowPipeline

    pipeline = AnyFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline(
        prompt=PROMPTS,
        num_inference_steps=steps,
        latents=noise,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        max_sequence_length=MAX_LENGTH,
        output_type="latent",
    ).frames


def calls_of(generator: WanGenerator) -> list[tuple[int, float, float]]:
    """(latents, t, r) of every call of the transformer from now on."""
    seen: list[tuple[int, float, float]] = []

    def note(_: object, __: object, kwargs: dict) -> None:
        times = kwargs["timestep"], kwargs["r_timestep"]
        assert all((time == time[0, 0]).all() for time in times)
        t, r = (float(time[0, 0]) / 1000 for time in times)
        seen.append((len(kwargs["hidden_states"]), t, r))

    generator.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# ---- what it computes


def test_jumps_and_adapter_are_the_stock_pipeline(
    anyflow: Path, tmp_path: Path
) -> None:
    """At 1 and 4 jumps, with the adapter through stock load_lora_weights; ours and theirs."""
    generator = load(anyflow)
    generator.save_trained(tmp_path)
    noise = noise_of(generator)
    for steps in (1, 4):
        ours = generator.sample(PROMPTS, [0, 1], num_steps=steps)
        theirs = stock_latents(anyflow, noise, steps, tmp_path)
        assert gap(ours, theirs) < 1e-5
        own = generator.sample(PROMPTS, [0, 1], num_steps=steps, scheduler="pipeline")
        assert gap(own, theirs) < 1e-5
    assert stock_gap(generator, PROMPTS[0]) < 1e-5
    base = stock_latents(anyflow, noise, 4, None)
    assert gap(ours, base) > 0.01
    with torch.no_grad(), generator.reference():
        assert gap(generator.sample(PROMPTS, [0, 1], num_steps=4), base) < 1e-5
    # and our own way back
    again = load(anyflow, loud=False)
    again.load_trained(tmp_path)
    assert torch.equal(again.sample(PROMPTS, [0, 1], num_steps=4), ours)


def test_copy_of_a_wan_is_that_wan_on_the_diagonal(folder: Path) -> None:
    cfg = tiny_config(folder)
    wan = read_transformer(cfg, Family(), folder / "transformer", device="cpu")
    copy = from_wan(wan)
    x = torch.randn(2, 16, 3, 4, 4)
    text = torch.randn(2, 5, 32)
    sigma = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        theirs = wan(x, 1000 * sigma, text, return_dict=False)[0]
        assert gap(mean_velocity(copy, x, sigma, sigma, text), theirs) < 2e-6
        # off the diagonal it is another function
        other = mean_velocity(copy, x, sigma, torch.zeros(2), text)
    assert gap(other, theirs) > 0.01


def test_flow_error_is_that_of_the_diagonal(anyflow: Path) -> None:
    """|u(x, t, t) - (eps - x0)|^2, with x by hand."""
    generator = load(anyflow)
    seen = calls_of(generator)
    clean, noise = torch.randn(2, 2, *generator.latent_shape)
    sigma = torch.tensor([0.5, 0.5])
    found = generator.flow_error(clean, noise, sigma, PROMPTS)
    assert seen == [(2, 0.5, 0.5)]
    x = 0.5 * clean + 0.5 * noise
    with torch.no_grad():
        u = generator.mean_velocity(x, sigma, sigma, PROMPTS)
    want = (u - (noise - clean)).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found.detach(), want)


def test_embedders_of_both_times_are_fp32(anyflow: Path) -> None:
    """diffusers leaves the second in bfloat16, where 999 is 1000."""
    generator = load(anyflow, dtype="bfloat16", loud=False)
    embedder = generator.transformer.condition_embedder
    for part in (embedder.time_embedder, embedder.delta_embedder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    ours = generator.sample(PROMPTS, [0, 1], num_steps=2)
    exact = load(anyflow, loud=False).sample(PROMPTS, [0, 1], num_steps=2)
    assert 1e-4 < gap(ours, exact) < 0.05


# ---- a group


def exact_rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """diffusers' norm without its cast to fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


@pytest.mark.parametrize("kernel", ["sde", "anchor"])
@pytest.mark.parametrize("tail", [1, 3])
def test_forwards_of_a_group(anyflow: Path, kernel: str, tail: int) -> None:
    """[k > 0] + 1 + G m latents; at G = 8 at most 26 with three jumps and 10 with one."""
    members = 8
    sampler = how(kernel=kernel, tail_steps=tail)
    generator = load(anyflow, sampler=sampler, rollout_batch=None)
    seen = calls_of(generator)
    sigmas = sigmas_of(16, 5.0)
    found = set()
    for seed in range(8):
        seen.clear()
        (group,) = generator.rollout(PROMPTS[:1], group_size=members, seeds=[seed])
        k = stochastic_step(seed, 6)
        found.add(k)
        assert sum(size for size, *_ in seen) == (k > 0) + 1 + members * tail
        assert sum(size for size, *_ in seen) <= {3: 26, 1: 10}[tail]
        # one jump to x_k, then the step
        times = [pytest.approx(pair, abs=1e-6) for pair in [(1.0, sigmas[k])] if k]
        target = generator.kernel.target(sigmas[k], sigmas[k + 1])
        assert (target == sigmas[k]) == (kernel == "sde")
        times.append(pytest.approx((sigmas[k], target), abs=1e-6))
        assert [(t, r) for _, t, r in seen[: len(times)]] == times
        assert seen[-1][2] == 0.0
        assert group.steps[0].sigma == sigmas[k]
    assert {0, 3} <= found


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("kernel", ["sde", "anchor"])
def test_first_ratio_is_one_and_the_gradient_collapses(
    anyflow: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """The replay has the density of the rollout; one forward has the gradient of four.

    The library casts to fp32 inside; in fp64 those casts are to fp64.
    """
    generator = load(anyflow, sampler=how(kernel=kernel))
    # weights of the usual size: loud ones amplify the rounding of a sum over members
    with torch.no_grad():
        for name, parameter in generator.module.named_parameters():
            if ".blocks." in name and "base_layer" in name:
                parameter.mul_(0.4)
    generator.module.to(dtype)
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(RMSNorm, "forward", exact_rms_norm)
    (group,) = generator.rollout(PROMPTS[:1], group_size=4, seeds=[3])
    (step,) = group.steps
    assert step.latent_MCFHW.shape[0] == 1
    law = generator.transition(group.prompt, step)
    found = log_prob(law, step.next_GCFHW)
    torch.testing.assert_close(found.detach(), step.log_prob_G, atol=1e-5, rtol=0)
    assert step.gain == generator.kernel.gain(step.sigma, step.sigma_next)
    trained = [p for p in generator.module.parameters() if p.requires_grad]

    def gradient(per_member: Tensor) -> Tensor:
        advantage = torch.tensor([1.0, -0.5, 0.25, -0.75])
        parts = torch.autograd.grad((advantage * per_member).sum(), trained)
        return torch.cat([part.flatten() for part in parts])

    collapsed = gradient(found)
    apart = torch.cat([step.latent_MCFHW] * 4)
    each = type(step)(
        apart,
        step.next_GCFHW,
        step.sigma,
        step.sigma_next,
        step.log_prob_G,
        step.std,
        step.gain,
    )
    wanted = gradient(
        log_prob(generator.transition(group.prompt, each), step.next_GCFHW)
    )
    assert wanted.abs().max() > 1e-4
    assert (collapsed - wanted).abs().max() < tolerance * wanted.abs().max()


def test_grid_of_the_prefix_by_hand() -> None:
    # shift 3: u of 0.75 is 0.5, the middle is u = 0.75, sigma = 2.25 / 2.5
    assert prefix_grid(0.75, 2, shift=3.0).tolist() == pytest.approx([1.0, 0.9, 0.75])
    # it is the training grid's own where the numbers agree
    sigmas = sigmas_of(16, 5.0)
    assert prefix_grid(sigmas[4], 4, shift=5.0).tolist() == pytest.approx(sigmas[:5])


def test_gap_of_the_map_by_hand(anyflow: Path) -> None:
    generator = load(anyflow)
    x = noise_of(generator)[:1]
    shift = 5.0 * 0.5 / 3.0
    with torch.no_grad():
        one = torch.ones(1)
        middle = shift * one

        def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return x - (t - r) * generator.mean_velocity(x, t, r, PROMPTS[:1])

        once = jump(x, one, 0 * one)
        twice = jump(jump(x, one, middle), middle, 0 * one)
    want = float((once - twice).norm() / once.norm())
    assert generator.map_gap(PROMPTS[:1], [0]) == pytest.approx(want, rel=1e-4)
    assert want > 0.01


def test_all_weights_can_be_trained(anyflow: Path, tmp_path: Path) -> None:
    """Without LoRA the reference is read again, and the file is the whole transformer."""
    generator = load(anyflow, lora=None)
    with torch.no_grad():
        for parameter in generator.module.parameters():
            parameter.mul_(1.01)
    ours = generator.sample(PROMPTS, [0, 1], num_steps=2)
    with torch.no_grad(), generator.reference():
        base = generator.sample(PROMPTS, [0, 1], num_steps=2)
    assert gap(ours, base) > 1e-3
    generator.save_trained(tmp_path)
    again = load(anyflow, lora=None)
    again.load_trained(tmp_path)
    assert torch.equal(again.sample(PROMPTS, [0, 1], num_steps=2), ours)


# ---- what it is read from, and what it refuses


def test_names_of_the_publication_are_read(anyflow: Path, tmp_path: Path) -> None:
    """NVIDIA's folders name classes of other code, and have keys that the library ignores."""
    other = tmp_path / "published"
    shutil.copytree(anyflow, other)
    for file, changes in (
        ("model_index.json", {"_class_name": "WanAnyFlowPipeline"}),
        (
            "model_index.json",
            {"transformer": ["far.models", "FAR_Wan_Transformer3DModel"]},
        ),
        (
            "model_index.json",
            {"scheduler": ["far.schedulers", "FlowMapDiscreteScheduler"]},
        ),
        ("transformer/config.json", {"_class_name": "FAR_Wan_Transformer3DModel"}),
        ("transformer/config.json", {"chunk_partition": [1, 3]}),
    ):
        values = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps(values | changes))
    assert Family.of(other) == Family(flow_map=True) == Family.of(anyflow)
    ours = load(other).sample(PROMPTS, [0, 1], num_steps=2)
    assert torch.equal(ours, load(anyflow).sample(PROMPTS, [0, 1], num_steps=2))


def test_kind_is_a_fact_of_the_folder(
    anyflow: Path, folder: Path, tmp_path: Path
) -> None:
    assert type(load_generator(tiny_config(folder), device="cpu")) is WanGenerator
    with pytest.raises(ValueError, match="load_generator"):
        WanGenerator.load(tiny_config(anyflow, sampler=how()), device="cpu")
    broken = tmp_path / "broken"
    shutil.copytree(anyflow, broken)
    file = broken / "transformer" / "config.json"
    values = json.loads(file.read_text())
    del values["deltatime_type"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="deltatime_type=None"):
        Family.of(broken)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_scale", 4.5),
        ("guidance_scale_2", 3.0),
        ("tail_guidance", 1.0),
        ("negative_prompt", "blur"),
        ("tail_solver", "ab2"),
        ("tail_cache", 2),
    ],
)
def test_settings_of_an_ode_are_refused(anyflow: Path, key: str, value: object) -> None:
    cfg = tiny_config(anyflow, sampler=how(**{key: value}))
    with pytest.raises(ValueError, match=rf"generator\.sampler\.{key}="):
        load_generator(cfg, device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": "anchor"}, "kernel=anchor"),
        ({"prefix_steps": 1}, "prefix_steps=1"),
    ],
)
def test_settings_of_a_flow_map_are_refused(
    folder: Path, changes: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load_generator(
            tiny_config(folder, sampler=SamplerConfig(**changes)), device="cpu"
        )


def test_anchor_needs_a_step_that_ends_above_zero() -> None:
    with pytest.raises(ValueError, match="stochastic_range=16"):
        SamplerConfig(kernel="anchor", stochastic_range=16)
    with pytest.raises(ValueError, match="noise_level"):
        SamplerConfig(kernel="anchor", noise_level=1.5)


def test_adapter_of_few_layers(anyflow: Path) -> None:
    """The default's six suffixes are all linears of attention and feed-forward."""
    generator = load(anyflow, lora=LoraConfig(rank=2, alpha=2.0))
    names = [n for n, _ in generator.module.named_parameters() if ".lora_A." in n]
    assert len(names) == 3 * 10
