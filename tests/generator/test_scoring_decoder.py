"""The small decoder of rewards: its frames by hand, its limits, and who uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import ConfigError, load
from common.strict_loading import load_pretrained
from generator.config import GeneratorConfig
from generator.scoring_decoder import (
    ScoringDecoder,
    check_fits,
    check_scaling,
    with_frames_before,
)
from generator.wan import WanGenerator
from launch.planning.known_models import small_decoder
from launch.schemas.pairs import DpoRun, PairsRun
from tests.tiny import build_tiny_wan, tiny_config

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small(**changes: object) -> AutoencoderTiny:
    """Eight times larger in space, four frames for a latent frame; loud random weights."""
    config = {
        "out_channels": 12,
        "latent_channels": 32,
        "decoder_block_out_channels": [4] * 4,
        "num_decoder_blocks": [1] * 4,
        "encoder_block_out_channels": [4],
        "num_encoder_blocks": [1],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderTiny(**{**config, **changes})
        for parameter in model.decoder.parameters():
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    small(scaling_factor=2.0, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path, decoder: Path) -> WanGenerator:
    cfg = tiny_config(folder, scoring_decoder=str(decoder))
    return WanGenerator.load(cfg, device="cpu")


def latents(generator: WanGenerator, count: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, *generator.latent_shape, generator=draw)


def test_frames_are_those_of_each_latent_frame_and_the_one_before(
    generator: WanGenerator, decoder: Path
) -> None:
    """Image by image: (z_f, z_(f-1)) / 2 + 1/4, four frames each, of the first only the last."""
    clean_BCFHW = latents(generator)
    model = AutoencoderTiny.from_pretrained(decoder)
    videos = []
    for clean_CFHW in clean_BCFHW:
        frames = []
        for f in range(3):
            pair = torch.cat([clean_CFHW[:, f], clean_CFHW[:, max(f - 1, 0)]])
            with torch.no_grad():
                out = model.decode(pair[None] / 2 + 0.25).sample[0]
            four = [out[0:3], out[3:6], out[6:9], out[9:12]]
            frames += four if f else four[-1:]
        unit = (torch.stack(frames) / 2 + 0.5).clamp(0, 1)
        videos.append((unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    found = generator.decode_to_score(clean_BCFHW)
    assert found.shape == generator.decode(clean_BCFHW).shape == (2, 9, 32, 32, 3)
    # a convolution of several images may round the other way
    assert (found.int() - torch.stack(videos).int()).abs().max() <= 1
    assert found.float().std() > 20
    assert len(found.unique(dim=1)[0]) > 1


def test_frames_before_the_first_are_the_first() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1, 1)
    found = with_frames_before(x, 3)[0, :, :, 0, 0].tolist()
    assert found == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    assert torch.equal(with_frames_before(x, 1), x)


def test_the_vae_decodes_everything_else(generator: WanGenerator, folder: Path) -> None:
    plain = WanGenerator.load(tiny_config(folder), device="cpu")
    clean = latents(plain)
    assert plain.scoring_decoder is None
    assert torch.equal(generator.decode(clean), plain.decode(clean))
    assert torch.equal(plain.decode_to_score(clean), plain.decode(clean))
    assert not torch.equal(generator.decode_to_score(clean), generator.decode(clean))
    assert generator.scoring_decoder.portions.size == 8
    assert not any(
        p.requires_grad for p in generator.scoring_decoder.model.parameters()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 3}, r"NAME has out_channels=3, and 4 frames .* are 12$"),
        (
            {"num_decoder_blocks": [1] * 3, "decoder_block_out_channels": [4] * 3},
            r"NAME has 3 stages that enlarge by 4, and the VAE enlarges by 8$",
        ),
        ({"upsampling_scaling_factor": 1}, r"NAME has 4 stages that enlarge by 1"),
        ({"latent_channels": 24}, r"NAME has latent_channels=24, and latents have 16"),
    ],
)
def test_other_video_shapes_are_refused(
    generator: WanGenerator, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(small(**changes), generator.codec, "NAME")
    check_fits(small(latent_channels=16), generator.codec, "NAME")


def test_stages_follow_the_vae(tmp_path: Path) -> None:
    """A VAE that compresses by 4 and 2 takes three stages and six channels."""
    folder = build_tiny_wan(tmp_path / "wan", spatial=4, temporal=2)
    generator = WanGenerator.load(tiny_config(folder), device="cpu")
    model = AutoencoderTiny.from_config(small_decoder(generator.codec.vae.config))
    made = ScoringDecoder(model, generator.codec, source="NAME", batch=1)
    clean = latents(generator)
    assert made.decode(clean).shape == generator.decode(clean).shape
    with pytest.raises(ValueError, match=r"out_channels=12.*are 6"):
        check_fits(small(), generator.codec, "NAME")


def test_missing_tensors_are_named_with_their_folder(
    folder: Path, decoder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(decoder, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    del tensors["decoder.layers.0.weight"]
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    cfg = tiny_config(folder, scoring_decoder=str(broken))
    with pytest.raises(ValueError, match=r"broken.*missing decoder\.layers\.0\.weight"):
        WanGenerator.load(cfg, device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere is not a model folder"):
        load_pretrained(AutoencoderTiny, tmp_path / "nowhere")
    # another class of the library
    config = json.loads((broken / "config.json").read_text())
    config["_class_name"] = "AutoencoderKL"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"AutoencoderKL.*AutoencoderTiny"):
        WanGenerator.load(cfg, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latents_mean": [0.0] * 16},
            r"config\.json has latents_mean, which is of the VAE",
        ),
        (
            {"latents_std": [1.0] * 16},
            r"config\.json has latents_std, which is of the VAE",
        ),
        ({"shift_factor": None}, r"has shift_factor=None, want a number"),
        ({"scaling_factor": 0}, r"has scaling_factor=0, want a number"),
        ({"scaling_factor": True}, r"has scaling_factor=True, want a number"),
    ],
)
def test_another_scaling_of_latents_is_refused(
    folder: Path,
    decoder: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    """diffusers passes over keys that it does not know, with a line in a log at most."""
    file = tmp_path / "config.json"
    config = json.loads((decoder / "config.json").read_text())
    file.write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        check_scaling(tmp_path)
    # What the loader asks first.
    shutil.copy(decoder / WEIGHTS, tmp_path)
    with pytest.raises(ValueError, match=message):
        WanGenerator.load(
            tiny_config(folder, scoring_decoder=str(tmp_path)), device="cpu"
        )


def test_pixels_have_a_gradient_and_frames_have_none(generator: WanGenerator) -> None:
    """A decoder is trained on the pixels whose bytes rewards see."""
    decoder = generator.scoring_decoder
    clean = latents(generator, 1).requires_grad_(requires_grad=True)
    pixels = decoder.pixels(clean)
    pixels.sum().backward()
    assert clean.grad.abs().sum() > 0
    levels = ((pixels.detach() / 2 + 0.5).clamp(0, 1) * 255).round()
    assert torch.equal(
        decoder.decode(clean), levels.to(torch.uint8).permute(0, 2, 3, 4, 1)
    )

    # Nothing is kept for a backward, and latents of another dtype are taken in fp32.
    seen = []
    hook = decoder.model.decoder.register_forward_hook(
        lambda module, args, out: seen.append(out.requires_grad)
    )
    half = clean.detach().bfloat16()
    assert torch.equal(decoder.decode(half), decoder.decode(half.float()))
    decoder.decode(clean)
    hook.remove()
    assert seen == [False] * 3


def test_dtype_and_layout_are_the_vaes(folder: Path, decoder: Path) -> None:
    cfg = tiny_config(
        folder,
        scoring_decoder=str(decoder),
        vae_dtype="bfloat16",
        vae_channels_last=True,
        decode_batch=1,
    )
    generator = WanGenerator.load(cfg, device="cpu")
    weight = generator.scoring_decoder.model.decoder.layers[0].weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert generator.decode_to_score(latents(generator, 1)).dtype == torch.uint8


def test_refused_where_rewards_see_the_vae_only() -> None:
    """Pairs and DPO score the VAE's frames; a generator of another class has no such latents."""
    option = "generator.scoring_decoder=tiny"
    for kind, file in ((PairsRun, "pairs"), (DpoRun, "dpo")):
        with pytest.raises(
            ConfigError, match=r"scoring_decoder=tiny is for the rewards"
        ):
            load(kind, CONFIGS / f"{file}.yaml", [option])
    with pytest.raises(ValueError, match=r"scoring_decoder=tiny decodes Wan's latents"):
        GeneratorConfig(path="x", scoring_decoder="tiny", target="own_package")
