"""Wan 2.2 as text-to-video: TI2V-5B, and T2V-A14B with its two transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.config import DpoConfig
from alignment.dpo import DpoLoop
from common.gaussian import log_prob
from generator.config import ExpertsConfig, SamplerConfig
from generator.denoiser import place_at
from generator.experts import check_stochastic_steps, check_training, high_steps
from generator.family import Family
from generator.offload import Waiting
from generator.sampler import initial_noise
from generator.wan import WanGenerator
from launch.compose import check_family
from tests.generator.families import build_family, gap, sigmas_of, stock, stock_latents
from tests.tiny import tiny_config, tiny_generator

PROMPTS = ["a red circle", "rain"]
A14B = Family(("transformer", "transformer_2"), 0.875)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("a14b"), "T2V-A14B")


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("ti2v"), "TI2V-5B")


def how(**changes: object) -> SamplerConfig:
    """Six steps of shift 12, of which four are of the expert for high noise."""
    values = {"num_steps": 6, "shift": 12.0, "stochastic_range": 2}
    values["guidance_scale"] = 4.0
    return SamplerConfig(**{**values, "guidance_scale_2": 3.0, **changes})


def noise_of(generator: WanGenerator) -> torch.Tensor:
    return torch.stack([initial_noise(seed, generator.latent_shape) for seed in (0, 1)])


def calls_of(generator: WanGenerator) -> Callable[[], str]:
    """Count the calls of each expert; returns a letter for each call, H or L."""
    seen: list[str] = []
    for letter, expert in zip("HL", generator.denoiser.experts, strict=True):
        expert.transformer.register_forward_pre_hook(
            lambda *_, letter=letter: seen.append(letter)
        )
    return lambda: "".join(seen)


# ---- TI2V-5B as text-to-video


def test_ti2v_text_is_the_stock_pipeline(ti2v: Path) -> None:
    """Stock gives every token a time of its own, all of them equal; ours is a time a sample."""
    sampler = SamplerConfig(num_steps=6, stochastic_range=3, guidance_scale=5.0)
    cfg = tiny_config(ti2v, height=64, width=64, sampler=sampler)
    generator = WanGenerator.load(cfg, device="cpu")
    assert generator.latent_shape == (48, 3, 4, 4)
    ours = generator.sample(PROMPTS, [0, 1])
    theirs = stock_latents(
        stock(ti2v),
        noise_of(generator),
        PROMPTS,
        steps=6,
        shift=3.0,
        height=64,
        width=64,
        guidance_scale=5.0,
    )
    assert gap(ours, theirs) < 1e-5
    (group,) = generator.rollout(PROMPTS[:1], group_size=2, seeds=[1])
    assert generator.decode(group.clean_GCFHW).shape == (2, 9, 64, 64, 3)


def test_families_of_the_folders(folder: Path, ti2v: Path, experts: Path) -> None:
    assert Family.of(folder) == Family()
    assert Family.of(ti2v) == Family(image="first_frame")
    assert Family.of(experts) == A14B


# ---- two experts


def test_experts_are_the_stock_pipeline(experts: Path) -> None:
    """With one guidance for both it differs: the expert for low noise has its own."""
    generator = WanGenerator.load(tiny_config(experts, sampler=how()), device="cpu")
    calls = calls_of(generator)
    ours = generator.sample(PROMPTS, [0, 1])
    assert calls() == "HHHHLL"
    pipeline = stock(experts)
    noise = noise_of(generator)
    wanted = {"steps": 6, "shift": 12.0, "guidance_scale": 4.0}
    theirs = stock_latents(pipeline, noise, PROMPTS, **wanted, guidance_scale_2=3.0)
    assert gap(ours, theirs) < 2e-5
    one = stock_latents(pipeline, noise, PROMPTS, **wanted)
    assert gap(ours, one) > 0.01
    # and the generator's own way into the stock pipeline
    own = generator.sample(PROMPTS, [0, 1], scheduler="pipeline")
    assert own.isfinite().all()


@pytest.mark.parametrize(
    ("shift", "boundary", "want"),
    [
        # steps of the first expert at 16, 20 and 40 steps
        (12.0, 0.875, (11, 13, 26)),
        (5.0, 0.875, (7, 9, 17)),
        (3.0, 0.875, (5, 7, 13)),
        (5.0, 0.9, (6, 8, 15)),
        (3.0, 0.9, (5, 6, 11)),
    ],
)
def test_steps_of_the_first_expert(
    shift: float, boundary: float, want: tuple[int, ...]
) -> None:
    """u* = b / (shift - (shift - 1) b); at shift 3, steps 6 of 20 and 12 of 40 lie on it."""
    found = tuple(
        high_steps(SamplerConfig(num_steps=steps, shift=shift), boundary)
        for steps in (16, 20, 40)
    )
    assert found == want


def test_step_on_the_boundary_is_the_first_experts(experts: Path) -> None:
    """sigma_6 of 20 steps is 0.8749999999999999 in fp64, and 0.875 in fp32 as stock has it."""
    sigma = sigmas_of(20, 3.0)[6]
    assert sigma < 0.875
    assert place_at(sigma, 0.875) == 0
    generator = WanGenerator.load(
        tiny_config(experts, sampler=how(num_steps=20, shift=3.0)), device="cpu"
    )
    calls = calls_of(generator)
    ours = generator.sample(PROMPTS[:1], [0])
    assert calls() == "H" * 7 + "L" * 13
    pipeline = stock(experts)
    seen: list[str] = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: seen.append("H"))
    pipeline.transformer_2.register_forward_pre_hook(lambda *_: seen.append("L"))
    theirs = stock_latents(
        pipeline,
        noise_of(generator)[:1],
        PROMPTS[:1],
        steps=20,
        shift=3.0,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
    )
    assert "".join(seen) == "H" * 14 + "L" * 26  # two branches a step
    assert gap(ours, theirs) < 5e-5


@pytest.mark.parametrize("train", ["high", "low"])
def test_transition_has_the_guidance_of_its_expert(experts: Path, train: str) -> None:
    """The first ratio is 1, and the gradient is the trained expert's."""
    first = 0 if train == "high" else 4
    sampler = how(stochastic_first=first, stochastic_range=first + 2, tail_solver="ab2")
    generator = tiny_generator(
        experts, sampler=sampler, experts=ExpertsConfig(train=train)
    )
    (group,) = generator.rollout(PROMPTS[:1], group_size=2, seeds=[1])
    (step,) = group.steps
    found = log_prob(generator.transition(group.prompt, step), step.next_GCFHW)
    torch.testing.assert_close(found.detach(), step.log_prob_G, atol=1e-5, rtol=0)
    found.sum().backward()
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    place = generator.denoiser.place_at(step.sigma)
    assert generator.denoiser.experts[place].module is generator.module
    # The scale of the other expert changes nothing, its own does.
    for key, its_own in (
        ("guidance_scale", train == "high"),
        ("guidance_scale_2", train == "low"),
    ):
        other = dataclasses.replace(sampler, **{key: 2.0})
        generator.cfg = dataclasses.replace(generator.cfg, sampler=other)
        again = log_prob(generator.transition(group.prompt, step), step.next_GCFHW)
        changed = (again - step.log_prob_G).abs().max() > 1e-4
        assert changed == its_own, key


def test_tail_begins_anew_behind_the_boundary(experts: Path) -> None:
    """The sigmas are cut where the expert changes; a second-order step needs one expert's past."""
    generator = tiny_generator(experts, sampler=how())
    sigmas = sigmas_of(6, 12.0)
    parts = generator.denoiser.parts(sigmas)
    assert parts == [sigmas[:5], sigmas[4:]]
    assert generator.denoiser.parts(sigmas[:3]) == [sigmas[:3]]
    assert generator.denoiser.parts([0.5, 0.0]) == [[0.5, 0.0]]


def test_batch_of_both_experts_is_refused(experts: Path) -> None:
    generator = tiny_generator(experts)
    x = torch.zeros(2, *generator.latent_shape)
    with torch.no_grad(), pytest.raises(ValueError, match=r"boundary 0\.875"):
        generator.velocity(x, torch.tensor([0.9, 0.5]), PROMPTS, guidance_scale=1.0)


def test_frozen_expert_is_fetched_once_a_rollout(experts: Path) -> None:
    generator = tiny_generator(experts, sampler=how(), rollout_batch=1)
    waiting = generator.denoiser.experts[1].waiting
    fetched = []
    waiting.fetch, fetch = lambda: (fetched.append(1), fetch()), waiting.fetch
    groups = generator.rollout(PROMPTS, group_size=2, seeds=[1, 2])
    # two groups of two members, two steps each
    assert (waiting.moves, len(fetched), waiting._there) == (1, 8, False)
    kept = tiny_generator(
        experts,
        sampler=how(),
        rollout_batch=1,
        experts=ExpertsConfig(offload=False),
    )
    assert kept.denoiser.experts[1].waiting is None
    same = kept.rollout(PROMPTS, group_size=2, seeds=[1, 2])
    for ours, theirs in zip(groups, same, strict=True):
        assert torch.equal(ours.clean_GCFHW, theirs.clean_GCFHW)


def test_waiting_weights_are_the_same_before_and_after() -> None:
    module = torch.nn.Linear(3, 3)
    before = module.weight.detach().clone()
    waiting = Waiting(module, torch.device("cpu"))
    with waiting.kept():
        waiting.fetch()
        with waiting.kept():
            waiting.fetch()
        assert waiting._there
    assert not waiting._there
    assert waiting.moves == 1
    assert torch.equal(module.weight, before)


# ---- adapters of two transformers


def test_adapters_of_both_experts_load_in_stock(experts: Path, tmp_path: Path) -> None:
    """Each in a folder: one file with both would lose the second without a word."""
    for train, shift in (("high", 0.1), ("low", -0.2)):
        generator = tiny_generator(
            experts, sampler=how(), experts=ExpertsConfig(train=train)
        )
        with torch.no_grad():
            for name, parameter in generator.module.named_parameters():
                if ".lora_B." in name:
                    parameter.add_(shift)
        # the second run samples with the first one's adapter, and saves it again
        if train == "low":
            generator.load_trained(tmp_path / "high")
        generator.save_trained(tmp_path / train)
    files = sorted(
        p.relative_to(tmp_path / "low") for p in (tmp_path / "low").rglob("*.s*")
    )
    name = "pytorch_lora_weights.safetensors"
    assert [file.as_posix() for file in files] == [name, f"transformer_2/{name}"]

    ours = generator.sample(PROMPTS, [0, 1])
    pipeline = stock(experts)
    pipeline.load_lora_weights(tmp_path / "low")
    pipeline.load_lora_weights(
        tmp_path / "low" / "transformer_2", load_into_transformer_2=True
    )
    options = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    wanted = {"steps": 6, "shift": 12.0, **options}
    noise = noise_of(generator)
    theirs = stock_latents(pipeline, noise, PROMPTS, **wanted)
    assert gap(ours, theirs) < 2e-5
    pipeline.delete_adapters("default_0")
    without = stock_latents(pipeline, noise, PROMPTS, **wanted)
    assert gap(ours, without) > 0.01
    # the reference has neither
    with torch.no_grad(), generator.reference():
        reference = generator.sample(PROMPTS, [0, 1])
    base = stock_latents(stock(experts), noise, PROMPTS, **wanted)
    assert gap(reference, base) < 2e-5


# ---- configs that cannot be


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"stochastic_range": 6, "num_steps": 16}}, "stochastic_range=6"),
        ({"experts": {"train": "low"}}, "stochastic_first=0"),
    ],
)
def test_stochastic_steps_of_the_frozen_expert_are_refused(
    changes: dict, words: str
) -> None:
    """At shift 3 the first expert has 5 of 16 steps, of which Longcat's T' = 6 is one more."""
    cfg = tiny_config(
        Path("a14b"),
        sampler=SamplerConfig(**changes.get("sampler", {})),
        experts=ExpertsConfig(**changes.get("experts", {})),
    )
    with pytest.raises(ValueError, match=words):
        check_stochastic_steps(cfg, A14B)
    at_12 = dataclasses.replace(cfg.sampler, shift=12.0)
    high = dataclasses.replace(cfg, sampler=at_12, experts=ExpertsConfig())
    check_stochastic_steps(high, A14B)
    check_stochastic_steps(cfg, Family())


def test_training_of_two_transformers_is_an_adapter_on_whole_weights() -> None:
    cfg = tiny_config(Path("a14b"))
    check_training(cfg, A14B, zero_stage=2)
    with pytest.raises(ValueError, match="zero_stage=3"):
        check_training(cfg, A14B, zero_stage=3)
    with pytest.raises(ValueError, match="lora=null"):
        check_training(dataclasses.replace(cfg, lora=None), A14B, zero_stage=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": ExpertsConfig(train="low")}, "experts.train=low"),
        ({"sampler": SamplerConfig(guidance_scale_2=3.0)}, "guidance_scale_2=3"),
    ],
)
def test_settings_of_two_transformers_need_two(
    folder: Path, changes: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        WanGenerator.load(tiny_config(folder, **changes), device="cpu")


@pytest.mark.parametrize("train", ["high", "low"])
def test_pairs_train_the_noise_levels_of_one_transformer(
    experts: Path, train: str
) -> None:
    """Training on stored latents loads one transformer; other noise levels are drawn again."""
    generator = WanGenerator.load(
        tiny_config(experts, experts=ExpertsConfig(train=train)),
        device="cpu",
        transformer_only=True,
    )
    assert len(generator.modules) == 1
    clean = torch.randn(1, 16, 3, 4, 4)
    loop = SimpleNamespace(cfg=DpoConfig(), seed=0, accepts=generator.trains_at)
    draw = DpoLoop.draw(loop, SimpleNamespace(chosen_NCFHW=clean), "step", 0, range(40))
    high = draw.sigma_N >= 0.875
    assert high.all() if train == "high" else not high.any()
    # uniform in its range: 40 draws of [0.875, 1] or [0, 0.875], 4 standard errors
    middle, width = (0.9375, 0.125) if train == "high" else (0.4375, 0.875)
    assert draw.sigma_N.mean().item() == pytest.approx(
        middle, abs=4 * width / math.sqrt(12 * 40)
    )
    text = torch.randn(5, 32)
    with generator.given_prompts({"rain": text}):
        error = generator.flow_error(
            clean, draw.noise_NCFHW[:1], draw.sigma_N[:1], ["rain"]
        )
        error.sum().backward()
        other = torch.tensor([0.5 if train == "high" else 0.95])
        with pytest.raises(RuntimeError, match="not loaded"):
            generator.flow_error(clean, draw.noise_NCFHW[:1], other, ["rain"])


def test_stochastic_steps_are_checked_before_a_run_loads(experts: Path) -> None:
    """The settings are checked from the folder's files, before rewards and weights are loaded."""
    cfg = tiny_config(experts, sampler=how(stochastic_range=5))
    run = SimpleNamespace(generator=cfg, zero_stage=2)
    with pytest.raises(ValueError, match="stochastic_range=5 must be at most 4"):
        check_family(run, stochastic=True)
    check_family(SimpleNamespace(generator=cfg, zero_stage=2))
    inside = SimpleNamespace(
        generator=dataclasses.replace(cfg, sampler=how()), zero_stage=2
    )
    check_family(inside, stochastic=True)
    # noised samples are of both transformers' noise levels
    with pytest.raises(ValueError, match="objective=awm"):
        check_family(inside, stochastic=True, objective="awm")
