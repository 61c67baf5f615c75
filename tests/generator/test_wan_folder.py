"""What a folder is, from its JSON files: a text-to-video Wan 2.1, or another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from generator.pipeline import require_vocabulary
from generator.wan import WanGenerator
from generator.wan_folder import find_wan, require_supported
from tests.tiny import tiny_config

# The JSON files of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, as it was published.
INDEX: dict[str, Any] = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.33.0.dev0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
    "z_dim": 16,
}
IMAGES = {"_class_name": "WanImageToVideoPipeline"}
EXPERTS = ["diffusers", "WanTransformer3DModel"]


def write(
    folder: Path,
    index: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> Path:
    """Write the JSON files with changes; None as a value removes nothing, it is JSON's null."""
    files = {
        "model_index.json": {**INDEX, **(index or {})},
        "transformer/config.json": {**TRANSFORMER, **(transformer or {})},
        "vae/config.json": {**VAE, **(vae or {})},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_published_and_saved_folders_are_supported(
    folder: Path, tmp_path: Path
) -> None:
    require_supported(write(tmp_path / "published"))
    # diffusers writes more keys today
    nulls = {"transformer_2": [None, None], "boundary_ratio": None}
    require_supported(write(tmp_path / "now", {**nulls, "expand_timesteps": False}))
    require_supported(folder)
    assert find_wan(str(folder)) == folder


@pytest.mark.parametrize(
    ("index", "transformer", "vae", "words"),
    [
        # a part of Wan 2.2 A14B
        ({"transformer_2": EXPERTS, "boundary_ratio": 0.875}, {}, {}, "no folder"),
        ({"transformer_2": EXPERTS}, {}, {}, "boundary_ratio None"),
        ({"boundary_ratio": 0.875}, {}, {}, "class None"),
        # conditioned on images
        ({"_class_name": "WanImageToVideoPipeline"}, {}, {}, "reads 16"),
        ({}, {"image_dim": 1280, "added_kv_proj_dim": 5120}, {}, "image_dim=1280"),
        ({}, {"pos_embed_seq_len": 514}, {}, "pos_embed_seq_len=514"),
        ({}, {"in_channels": 36}, {}, "a WanPipeline whose transformer reads 36"),
        ({}, {"out_channels": 32}, {}, "writes 32"),
        (IMAGES, {"in_channels": 36, "image_dim": 1280}, {}, "image_encoder"),
        (
            {**IMAGES, "image_encoder": ["transformers", "CLIPVisionModel"]},
            {"in_channels": 36},
            {},
            "image_dim=None",
        ),
        # other kinds of Wan
        ({"_class_name": "WanVACEPipeline"}, {}, {}, "VACE"),
        ({}, {"_class_name": "WanVACETransformer3DModel"}, {}, "WanVACE"),
        ({}, {"vace_layers": [0, 5]}, {}, "VACE"),
        ({"_class_name": "WanAnimatePipeline"}, {}, {}, "Animate"),
        ({"_class_name": "AnyFlowFARPipeline"}, {}, {}, "in chunks"),
        ({"_class_name": "AnyFlowPipeline"}, {}, {}, "instead of AnyFlow"),
        ({}, {"_class_name": "AnyFlowTransformer3DModel"}, {}, "AnyFlow"),
        ({}, {"gate_value": 0.25, "deltatime_type": "r"}, {}, "flow map"),
        # other models
        ({"_class_name": "HunyuanVideoPipeline"}, {}, {}, "HunyuanVideoPipeline"),
        ({"_class_name": "LTXPipeline"}, {}, {}, "LTXPipeline"),
        ({"_class_name": None}, {}, {}, "None"),
        ({"vae": ["diffusers", "AutoencoderKLLTXVideo"]}, {}, {}, "LTXVideo"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, {}, {}, "T5Encoder"),
        ({"transformer": [None, None]}, {}, {}, "transformer of class None"),
    ],
)
def test_folder_of_another_kind_is_refused(
    tmp_path: Path,
    index: dict[str, Any],
    transformer: dict[str, Any],
    vae: dict[str, Any],
    words: str,
) -> None:
    """The sentence says what it is, and what this project runs; nothing is loaded."""
    write(tmp_path, index, transformer, vae)
    with pytest.raises(ValueError, match=words) as caught:
        WanGenerator.load(tiny_config(tmp_path), device="cpu")
    assert str(caught.value).startswith(str(tmp_path))
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_with_a_second_transformer_beside_its_index_is_refused(
    tmp_path: Path,
) -> None:
    write_second(write(tmp_path))
    with pytest.raises(ValueError, match="two transformers"):
        require_supported(tmp_path)


def write_second(folder: Path, **changes: Any) -> None:
    (folder / "transformer_2").mkdir(exist_ok=True)
    text = json.dumps({**TRANSFORMER, **changes})
    (folder / "transformer_2" / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("index", "changes", "words"),
    [
        ({"boundary_ratio": 1.5}, {}, "boundary_ratio=1.5"),
        ({"boundary_ratio": "0.9"}, {}, "boundary_ratio='0.9'"),
        ({}, {"num_layers": 40}, "num_layers is 30 and 40"),
        ({"expand_timesteps": True}, {}, "expand_timesteps"),
    ],
)
def test_two_transformers_that_are_no_a14b_are_refused(
    tmp_path: Path, index: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    both = {"transformer_2": EXPERTS, "boundary_ratio": 0.875}
    write_second(write(tmp_path, {**both, **index}), **changes)
    with pytest.raises(ValueError, match=words):
        require_supported(tmp_path)
    write_second(write(tmp_path, both), _diffusers_version="1")
    assert require_supported(tmp_path).boundary == 0.875


@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "vae/config.json"]
)
@pytest.mark.parametrize("text", ["", "{", "[1]", "version https://git-lfs\n"])
def test_json_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, text: str
) -> None:
    (write(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=r"json") as caught:
        find_wan(str(tmp_path))
    assert str(tmp_path / name) in str(caught.value)


def test_folder_without_its_parts_is_named(folder: Path, tmp_path: Path) -> None:
    """A download that was stopped: a folder is missing, or its weights are."""
    for part, words in (
        ("transformer", "transformer/config.json"),
        ("vae", "vae"),
        ("text_encoder", "text_encoder"),
        ("tokenizer", "tokenizer"),
        ("scheduler", "scheduler"),
        ("vae/diffusion_pytorch_model.safetensors", "vae has no weights"),
        ("text_encoder/model.safetensors", "text_encoder has no weights"),
    ):
        copy = tmp_path / part.replace("/", "_")
        shutil.copytree(folder, copy)
        gone = copy / part
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink()
        with pytest.raises(OSError, match=words) as caught:
            WanGenerator.load(tiny_config(copy), device="cpu")
        assert str(copy) in str(caught.value)


def test_training_on_stored_latents_needs_the_transformer_alone(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "wan"
    shutil.copytree(folder, copy)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(copy / part)
    generator = WanGenerator.load(
        tiny_config(copy), device="cpu", transformer_only=True
    )
    assert sum(p.numel() for p in generator.module.parameters()) > 0


def test_cached_hub_name_is_checked_and_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models--owner--wan"
    snapshot = model / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    generator = WanGenerator.load(tiny_config(tmp_path, path="owner/wan"), device="cpu")
    same = WanGenerator.load(tiny_config(folder), device="cpu")
    assert torch.equal(generator.sample(["rain"], [1]), same.sample(["rain"], [1]))
    write(snapshot, {"boundary_ratio": 0.9})
    with pytest.raises(ValueError, match="two transformers"):
        WanGenerator.load(tiny_config(tmp_path, path="owner/wan"), device="cpu")


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
@pytest.mark.parametrize(
    "value", [None, [0.5] * 4, 0.5, ["1"] * 16, [float("nan")] * 16, [True] * 16]
)
def test_vae_without_statistics_of_its_latents_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    """diffusers would take those of Wan 2.1, whatever the VAE."""
    with pytest.raises(ValueError, match=key):
        require_supported(write(tmp_path, vae={key: value}))


def test_tokenizer_with_more_tokens_than_the_text_encoder_is_refused() -> None:
    pipeline = SimpleNamespace(
        tokenizer=range(10),
        text_encoder=SimpleNamespace(config=SimpleNamespace(vocab_size=9)),
    )
    with pytest.raises(ValueError, match="10 tokens"):
        require_vocabulary(pipeline, Path("wan"))
