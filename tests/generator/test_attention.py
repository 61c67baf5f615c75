"""Attention backends are set on our transformer alone, and each phase has its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.models import attention_dispatch

from generator import attention
from generator.config import GeneratorConfig, SamplerConfig
from generator.wan import WanGenerator
from tests.tiny import tiny_config, tiny_generator

PROMPT = "a red circle"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every attention call, None for the process's."""
    seen: list[str] = []
    plain = attention_dispatch.dispatch_attention_fn

    def watch(*args: object, backend: object = None, **kwargs: object) -> object:
        seen.append(None if backend is None else backend.value)
        return plain(*args, backend=backend, **kwargs)

    monkeypatch.setattr(
        "diffusers.models.transformers.transformer_wan.dispatch_attention_fn", watch
    )
    return seen


def generator_of(folder: Path, sampler: dict, **changes: object) -> WanGenerator:
    chosen = dataclasses.replace(tiny_config(folder).sampler, **sampler)
    return tiny_generator(folder, sampler=chosen, **changes)


def phases(seen: list[str]) -> list[str]:
    """Backends in the order of their first use."""
    return [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]


def test_every_phase_uses_its_backend(folder: Path, used: list[str]) -> None:
    generator = generator_of(
        folder,
        {
            "attention": "_native_flash",
            "tail_attention": "_native_math",
            "stochastic_first": 1,
        },
        attention="native",
    )
    (group,) = generator.rollout([PROMPT], group_size=2, seeds=[1])
    # prefix, stochastic step, tail
    assert phases(used) == ["_native_flash", "native", "_native_math"]
    used.clear()
    generator.transition(PROMPT, group.steps[0])
    assert phases(used) == ["native"]
    used.clear()
    generator.sample([PROMPT], [1])
    generator.sample([PROMPT], [1], scheduler="pipeline")
    assert phases(used) == ["_native_flash"]


def test_tail_keeps_the_samplers_backend(folder: Path, used: list[str]) -> None:
    generator = generator_of(folder, {"attention": "_native_math"})
    generator.rollout([PROMPT], group_size=2, seeds=[1])
    assert set(used) == {"_native_math", None}
    assert used[-1] == "_native_math"


def test_backend_of_the_generator_serves_every_call(
    folder: Path, used: list[str]
) -> None:
    generator = generator_of(folder, {}, attention="_native_math")
    generator.rollout([PROMPT], group_size=2, seeds=[1])
    generator.sample([PROMPT], [1])
    assert set(used) == {"_native_math"}


def test_frozen_copy_uses_the_generators_backend(folder: Path, used: list[str]) -> None:
    generator = generator_of(folder, {}, lora=None, attention="_native_math")
    with generator.reference():
        generator.sample([PROMPT], [1])
    assert set(used) == {"_native_math"}


def test_backends_agree(folder: Path) -> None:
    want = generator_of(folder, {}).sample([PROMPT], [1])
    for name in attention.CPU_BACKENDS:
        got = generator_of(folder, {"attention": name}).sample([PROMPT], [1])
        assert float((got - want).norm() / want.norm()) < 1e-5


def test_other_models_keep_the_processes_backend(
    folder: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    ours = generator_of(
        folder, {"tail_attention": "_native_flash"}, attention="_native_math"
    )
    other = generator_of(folder, {})
    ours.rollout([PROMPT], group_size=2, seeds=[1])
    assert registry._active_backend == before
    used.clear()
    other.sample([PROMPT], [1])
    assert set(used) == {None}


def test_backend_is_restored_after_an_error(folder: Path) -> None:
    transformer = generator_of(folder, {}, attention="native").module.get_base_model()
    with pytest.raises(KeyError), attention.backend(transformer, "_native_math"):
        raise KeyError
    names = {p._attention_backend.value for p in attention.processors_of(transformer)}
    assert names == {"native"}


# ---- refusals ----


@pytest.mark.parametrize("name", ["sage", "_flash_3"])
def test_forward_only_backend_is_for_the_tail_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no backward pass"):
        GeneratorConfig(path="x", attention=name)
    with pytest.raises(ValueError, match=f"{name} has no backward pass"):
        SamplerConfig(attention=name)
    assert SamplerConfig(tail_attention=name).tail_attention == name


def test_unknown_backend_raises() -> None:
    for kind in (SamplerConfig, lambda **x: GeneratorConfig(path="x", **x)):
        with pytest.raises(ValueError, match="flesh is unknown"):
            kind(attention="flesh")


@pytest.mark.parametrize(
    ("changes", "sampler", "words"),
    [
        ({"attention": "flash"}, {}, r"generator\.attention=flash"),
        ({}, {"attention": "_native_cudnn"}, r"sampler\.attention=_native_cudnn"),
        ({}, {"tail_attention": "sage"}, r"sampler\.tail_attention=sage"),
    ],
)
def test_backend_that_cannot_run_on_a_cpu_raises_at_load(
    folder: Path, changes: dict, sampler: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        generator_of(folder, sampler, **changes)


def test_missing_package_of_a_backend_raises() -> None:
    with pytest.raises(ValueError, match=r"generator\.attention=flash .*flash-attn"):
        attention.require_backend("generator.attention", "flash", torch.device("cuda"))
