"""Decoding equals the stock pipeline, encoding the definition; sizes come from the VAE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from generator.wan import WanGenerator
from tests.tiny import build_tiny_wan, tiny_config, tiny_generator


@pytest.fixture(scope="module")
def generator(folder: Path) -> WanGenerator:
    return tiny_generator(folder)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that compresses by 4 in space and 2 in time."""
    return build_tiny_wan(tmp_path_factory.mktemp("coarse"), spatial=4, temporal=2)


def test_decode_gives_the_pipelines_bytes(
    generator: WanGenerator, folder: Path
) -> None:
    stock = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(
        3, *generator.latent_shape, generator=torch.Generator().manual_seed(0)
    )
    call = {
        "prompt": ["a", "b", "c"],
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
    }
    call |= {"guidance_scale": 3.0, "max_sequence_length": 24}
    latents = stock(**call, latents=noise, output_type="latent").frames
    unit = stock(**call, latents=noise, output_type="np").frames
    video = generator.decode(latents)
    assert video.shape == (3, 9, 32, 32, 3)
    assert video.dtype == torch.uint8
    assert (video.numpy() == (unit * 255).round().astype("uint8")).all()
    assert video.float().std() > 20  # a picture, not a plane


def test_decode_batch_changes_nothing(folder: Path) -> None:
    latents = torch.randn(3, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    one, all_ = (
        WanGenerator.load(tiny_config(folder, decode_batch=n), device="cpu").decode(
            latents
        )
        for n in (1, 3)
    )
    assert (
        one.int() - all_.int()
    ).abs().max() <= 1  # the last bit of a convolution may round a pixel the other way
    assert (one != all_).float().mean() < 1e-3


def test_encode_is_the_normalised_posterior_mean(generator: WanGenerator) -> None:
    video = torch.randint(
        0,
        256,
        (2, 9, 32, 32, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(2),
    )
    latents = generator.encode(video)
    assert tuple(latents.shape[1:]) == generator.latent_shape
    vae = generator.codec.vae
    pixels = (video.double() / 255 * 2 - 1).permute(0, 4, 1, 2, 3).float()
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist.mean
    for channel in (
        0,
        7,
        15,
    ):  # mean and std of the published VAE, as its config lists them
        mean, std = {0: (-0.7571, 2.8184), 7: (1.5508, 2.0743), 15: (-0.2921, 1.9160)}[
            channel
        ]
        assert torch.allclose(
            latents[:, channel], (posterior[:, channel] - mean) / std, atol=1e-5
        )


def test_compression_is_read_from_the_vae(coarse: Path) -> None:
    generator = WanGenerator.load(
        tiny_config(coarse, height=24, width=16, num_frames=5), device="cpu"
    )
    assert generator.latent_shape == (16, 3, 6, 4)
    latents = torch.randn(1, *generator.latent_shape)
    video = generator.decode(latents)
    assert video.shape == (1, 5, 24, 16, 3)
    assert generator.encode(video).shape == (1, *generator.latent_shape)
    with pytest.raises(ValueError, match="7"):
        generator.encode(torch.zeros(1, 7, 24, 16, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"height": 40}, r"height.*\b32\b"),
        ({"width": 20}, r"width.*\b16\b"),
        (
            {"num_frames": 8},
            r"num_frames.*\b9\b",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    folder: Path, sizes: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        WanGenerator.load(tiny_config(folder, **sizes), device="cpu")


def test_a_config_that_contradicts_the_layers_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_wan(tmp_path / "wan", spatial=4, temporal=2)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text()) | {
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
    }
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="scale_factor_spatial=8"):
        WanGenerator.load(tiny_config(folder), device="cpu")


def test_encode_refuses_floats(generator: WanGenerator) -> None:
    with pytest.raises(ValueError, match="uint8"):
        generator.encode(torch.zeros(1, 9, 32, 32, 3))


# ---- faster VAEs ----

SHAPES = Path(__file__).resolve().parents[2] / "assets" / "shapes" / "wan"


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """Latents (2, C, F, H, W) of two moving squares, by the trained VAE of the embedded world."""
    video = torch.zeros(2, 5, 32, 32, 3, dtype=torch.uint8)
    for frame in range(5):
        video[0, frame, 4 + frame : 12 + frame, 6:14, 0] = 220
        video[1, frame, 18:28, 4 * frame : 4 * frame + 9, 2] = 200
    return shapes_generator().encode(video)


def shapes_generator(**changes: object) -> WanGenerator:
    config = tiny_config(SHAPES, num_frames=5, max_sequence_length=32, **changes)
    return WanGenerator.load(config, device="cpu")


@pytest.mark.parametrize(
    ("changes", "largest", "mean"),
    [
        ({"vae_channels_last": True}, 1, 1e-3),
        ({"vae_dtype": "bfloat16"}, 2, 0.5),
        ({"vae_dtype": "bfloat16", "vae_channels_last": True}, 2, 0.5),
    ],
)
def test_faster_vae_differs_by_a_level(
    picture: torch.Tensor, changes: dict[str, object], largest: int, mean: float
) -> None:
    plain, fast = shapes_generator(), shapes_generator(**changes)
    want = plain.decode(picture)
    assert want.float().std() > 20
    error = (fast.decode(picture).int() - want.int()).abs()
    assert int(error.max()) <= largest
    assert float(error.float().mean()) < mean
    # it did compute otherwise
    assert fast.codec.vae.dtype == getattr(torch, changes.get("vae_dtype", "float32"))
    kernel = next(p for p in fast.codec.vae.parameters() if p.dim() == 5)
    wanted = bool(changes.get("vae_channels_last"))
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d) == wanted

    latents = fast.encode(want)
    assert latents.dtype == torch.float32
    close = plain.encode(want)
    assert float((latents - close).norm() / close.norm()) < 0.02
