"""Videos that begin with an image: TI2V-5B, Wan 2.2 I2V-A14B and Wan 2.1 I2V-14B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.gaussian import log_prob
from common.types import ImagePrompt
from generator import adapter_file
from generator.config import LoraConfig, SamplerConfig
from generator.family import Family
from generator.sampler import initial_noise
from generator.wan import WanGenerator
from tests.generator.families import (
    build_family,
    gap,
    stock,
    stock_latents,
    write_image,
)
from tests.tiny import tiny_config, tiny_generator

KINDS = {
    "TI2V-5B": Family(image="first_frame"),
    "I2V-A14B": Family(("transformer", "transformer_2"), 0.9, "channels"),
    "I2V-14B": Family(image="channels+clip"),
}
# CLIP's tokens fix the length of the text, TI2V's VAE compresses by 16
SIZES: dict[str, dict[str, Any]] = {
    "TI2V-5B": {"height": 64, "width": 64},
    "I2V-A14B": {},
    "I2V-14B": {"max_sequence_length": 512},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: build_family(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[ImagePrompt]:
    folder = tmp_path_factory.mktemp("images")
    files = [write_image(folder / f"{seed}.png", seed) for seed in (0, 1)]
    return [ImagePrompt("rain", files[0]), ImagePrompt("a cat", files[1])]


def config(folders: dict[str, Path], kind: str, **changes: Any) -> Any:
    """Six steps of shift 5, of which four are above 0.9."""
    guidance = {"guidance_scale": 3.0}
    if kind == "I2V-A14B":
        guidance["guidance_scale_2"] = 2.0
    sampler = SamplerConfig(num_steps=6, shift=5.0, stochastic_range=2, **guidance)
    values = {"sampler": sampler, **SIZES[kind], **changes}
    return tiny_config(folders[kind], **values)


def theirs(
    folders: dict[str, Path], kind: str, cfg: Any, prompt: ImagePrompt, shape: Any
) -> torch.Tensor:
    """The stock pipeline's latents of one prompt, from the noise of seed 7."""
    noise = initial_noise(7, shape)[None]
    if kind == "TI2V-5B":
        # stock overwrites the first frame
        noise = torch.cat([noise[:, :, :1], noise], dim=2)
    options = {"guidance_scale": cfg.sampler.guidance_scale}
    if kind == "I2V-A14B":
        options["guidance_scale_2"] = cfg.sampler.guidance_scale_2
    return stock_latents(
        stock(folders[kind], images=True),
        noise,
        [prompt.text],
        steps=6,
        shift=5.0,
        image=Image.open(prompt.image).convert("RGB"),
        height=cfg.height,
        width=cfg.width,
        max_sequence_length=cfg.max_sequence_length,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_video_of_an_image_is_the_stock_pipelines(
    folders: dict[str, Path], prompts: list[ImagePrompt], kind: str
) -> None:
    cfg = config(folders, kind)
    assert Family.of(folders[kind]) == KINDS[kind]
    generator = WanGenerator.load(cfg, device="cpu")
    # two prompts in a batch; each image is its own
    ours = generator.sample(prompts, [3, 7])
    assert ours.shape == (2, *generator.latent_shape)
    shape = generator._walk_shape(prompts[1])
    stock_1CFHW = theirs(folders, kind, cfg, prompts[1], shape)
    assert gap(ours[1:], stock_1CFHW) < 2e-5
    # by the generator's own way into the pipeline, on the folder's scheduler
    own = generator.sample(prompts[1:], [7], scheduler="pipeline")
    assert own.shape == stock_1CFHW.shape

    # another image is another video
    other = ImagePrompt(prompts[1].text, prompts[0].image)
    assert gap(generator.sample([other], [7]), stock_1CFHW) > 0.01
    if kind == "TI2V-5B":
        first = generator.images.get(prompts[1].image).latent_CFHW
        assert torch.equal(ours[1, :, :1], first)
        # without an image it is text-to-video, with a noise for every frame
        texts = generator.sample(["a cat"], [7])
        assert texts.shape == (1, *generator.latent_shape)
        assert gap(texts, stock_1CFHW) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_first_ratio_of_a_video_of_an_image_is_one(
    folders: dict[str, Path], prompts: list[ImagePrompt], kind: str
) -> None:
    """Its log-prob is the MEAN over the latent frames that are not given."""
    cfg = config(folders, kind)
    generator = tiny_generator(
        folders[kind], **{k: getattr(cfg, k) for k in cfg.__dict__ if k != "path"}
    )
    (group,) = generator.rollout(prompts[:1], group_size=2, seeds=[1])
    (step,) = group.steps
    channels, frames, height, width = generator.latent_shape
    free = frames - 1 if kind == "TI2V-5B" else frames
    assert step.next_GCFHW.shape == (2, channels, free, height, width)
    assert group.clean_GCFHW.shape == (2, *generator.latent_shape)
    law = generator.transition(group.prompt, step)
    found_G = log_prob(law, step.next_GCFHW)
    torch.testing.assert_close(found_G.detach(), step.log_prob_G, atol=1e-5, rtol=0)
    # by hand: mean of -(x - mu)^2 / (2 std^2) - log std - log(2 pi) / 2
    off = (step.next_GCFHW - law.mean.detach()).double() / law.std
    by_hand = -0.5 * off.square().flatten(1).mean(1)
    by_hand -= torch.log(torch.tensor(law.std * (2 * torch.pi) ** 0.5)).double()
    torch.testing.assert_close(found_G.detach().double(), by_hand, atol=1e-5, rtol=0)
    found_G.sum().backward()
    assert generator.decode(group.clean_GCFHW).shape[0] == 2


def test_freed_encoders_serve_known_images(
    folders: dict[str, Path], prompts: list[ImagePrompt]
) -> None:
    generator = WanGenerator.load(config(folders, "I2V-14B"), device="cpu")
    want = generator.sample(prompts[:1], [1])
    generator.encode_prompts(prompts[:1])
    generator.free_text_encoder()
    assert torch.equal(generator.sample(prompts[:1], [1]), want)
    assert generator.sample(prompts[:1], [1], scheduler="pipeline").isfinite().all()
    generator.prompts._rows["a cat"] = generator.prompts._rows["rain"]
    with pytest.raises(RuntimeError, match="image encoder has been freed"):
        generator.sample(prompts[1:], [1])


def test_adapter_of_an_image_model_is_in_its_blocks(
    folders: dict[str, Path], prompts: list[ImagePrompt], tmp_path: Path
) -> None:
    """CLIP's tokens go through a feed-forward with the names of a block's: it stays as it is."""
    targets = ("to_q", "net.0.proj", "net.2", "add_k_proj")
    cfg = config(
        folders, "I2V-14B", lora=LoraConfig(rank=4, alpha=8.0, targets=targets)
    )
    values = {key: getattr(cfg, key) for key in cfg.__dict__ if key != "path"}
    generator = tiny_generator(folders["I2V-14B"], **values)
    generator.save_trained(tmp_path)
    stored = adapter_file.read(tmp_path)
    # three blocks with two queries, two linears and one projection each
    assert len(stored.pairs) == 3 * 5
    assert all(name.startswith("blocks.") for name in stored.pairs)
    names = adapter_file.comfyui(stored)
    assert "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight" in names

    pipeline = stock(folders["I2V-14B"], images=True)
    pipeline.load_lora_weights(tmp_path)
    noise = initial_noise(7, generator.latent_shape)[None]
    image = Image.open(prompts[0].image).convert("RGB")
    options = {"image": image, "guidance_scale": 3.0, "max_sequence_length": 512}
    got = stock_latents(pipeline, noise, ["rain"], steps=6, shift=5.0, **options)
    assert gap(generator.sample(prompts[:1], [7]), got) < 2e-5


# ---- what cannot be


def test_text_of_another_length_is_refused(folders: dict[str, Path]) -> None:
    """The stock pipeline would run and come out wrong: attention cuts 512 tokens as the text."""
    with pytest.raises(ValueError, match="max_sequence_length=24 must be 512"):
        WanGenerator.load(
            config(folders, "I2V-14B", max_sequence_length=24), device="cpu"
        )


def test_prompts_must_fit_the_family(
    folders: dict[str, Path], folder: Path, prompts: list[ImagePrompt], tmp_path: Path
) -> None:
    images = WanGenerator.load(config(folders, "I2V-A14B"), device="cpu")
    with pytest.raises(ValueError, match="this prompt has none: 'rain'"):
        images.sample(["rain"], [1])
    texts = WanGenerator.load(tiny_config(folder), device="cpu")
    with pytest.raises(ValueError, match="texts alone"):
        texts.rollout(prompts[:1], group_size=2, seeds=[1])

    # a TI2V takes texts and images together
    both = WanGenerator.load(config(folders, "TI2V-5B"), device="cpu")
    mixed = both.sample([prompts[0], "rain"], [1, 2])
    assert torch.equal(mixed[:1], both.sample(prompts[:1], [1]))
    assert torch.equal(mixed[1:], both.sample(["rain"], [2]))
    (tmp_path / "no.png").write_text("no image")
    for name in ("no.png", "nothing.png"):
        with pytest.raises(ValueError, match=f"{name}: no image"):
            both.sample([ImagePrompt("rain", str(tmp_path / name))], [1])
