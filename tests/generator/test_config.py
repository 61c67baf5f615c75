from __future__ import annotations

import subprocess
import sys

import pytest

from generator.config import WAN_LINEARS, GeneratorConfig, LoraConfig, SamplerConfig


def test_defaults_are_the_papers() -> None:
    """LongCat-Video 2510.22200, Table 9; shift and guidance of the open Wan reproduction."""
    sampler = SamplerConfig()
    assert (
        sampler.num_steps,
        sampler.stochastic_range,
        sampler.noise_level,
        sampler.max_std,
    ) == (16, 6, 1.0, 0.45)
    assert (sampler.shift, sampler.guidance_scale, sampler.negative_prompt) == (
        3.0,
        4.5,
        "",
    )
    lora = LoraConfig()
    assert (lora.rank, lora.alpha, lora.targets) == (128, 64.0, WAN_LINEARS)
    assert len(set(WAN_LINEARS)) == 6


@pytest.mark.parametrize(
    ("schema", "values", "words"),
    [
        (SamplerConfig, {"num_steps": 0, "stochastic_range": 1}, ["num_steps", "0"]),
        (SamplerConfig, {"num_steps": 4}, ["stochastic_range", "num_steps=4", "6"]),
        (SamplerConfig, {"shift": -1.0}, ["shift", "-1.0"]),
        (SamplerConfig, {"noise_level": -0.5}, ["noise_level", "-0.5"]),
        (SamplerConfig, {"max_std": 0.0}, ["max_std", "0.0"]),
        (SamplerConfig, {"max_std": None}, ["max_std", "noise_level"]),
        (SamplerConfig, {"guidance_scale": 0.5}, ["guidance_scale", "0.5"]),
        (
            SamplerConfig,
            {"shift": -1.0, "noise_level": -2.0},
            ["shift", "-1.0", "noise_level", "-2.0"],
        ),
        (LoraConfig, {"rank": 0}, ["rank", "0"]),
        (LoraConfig, {"alpha": -3.0}, ["alpha", "-3.0"]),
        (LoraConfig, {"targets": ()}, ["targets"]),
        (GeneratorConfig, {"path": ""}, ["path"]),
        (GeneratorConfig, {"path": "x", "decode_batch": 0}, ["decode_batch", "0"]),
        (GeneratorConfig, {"path": "x", "fps": -8.0}, ["fps", "-8.0"]),
    ],
)
def test_invalid_value_names_its_field(
    schema: type, values: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=schema.__name__) as caught:
        schema(**values)
    assert all(word in str(caught.value) for word in words)


def test_noiseless_sampler_needs_no_max_std() -> None:
    assert SamplerConfig(noise_level=0.0, max_std=None).max_std is None


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import generator.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
