"""Prompts with images in the commands: which of them take images, and who reads the text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.grpo import _prompts_of
from alignment.prompts import image_files
from common.types import Group, ImagePrompt, Step
from launch import sample
from launch.compose import (
    check_family,
    check_image_objective,
    check_images,
    check_takes_images,
)
from launch.schemas.training import SampleRun
from tests.generator.families import write_image
from tests.generator.test_wan_folder import IMAGES, write
from tests.tiny import tiny_config

LATENT = (2, 16, 3, 4, 4)


def group_of(frames: int) -> Group:
    """Two members whose step has so many latent frames, and whose clean latents have three."""
    next_GCFHW = torch.zeros(2, 16, frames, 4, 4)
    step = Step(next_GCFHW, next_GCFHW, 0.9, 0.8, torch.zeros(2), 0.1, 0.1)
    return Group(ImagePrompt("rain", "a.png"), (step,), torch.zeros(LATENT))


def test_rewards_read_the_text() -> None:
    assert _prompts_of([group_of(3)]) == ["rain", "rain"]


def test_clean_latents_may_have_one_given_frame() -> None:
    assert group_of(2).size == 2
    for frames in (1, 4):
        with pytest.raises(ValueError, match="clean_GCFHW"):
            group_of(frames)


def test_video_of_an_image_is_requested_with_its_text_in_the_row() -> None:
    prompts = [ImagePrompt("rain", "a.png"), "sun"]
    cfg = SampleRun(prompts="p.jsonl", out="out", generator=tiny_config(Path("wan")))
    first, second = sample.list_requests(cfg, prompts)
    assert (first.prompt, first.row) == (prompts[0], {"prompt": "rain"})
    assert second.prompt == "sun"
    # another image under the same name is another video
    assert image_files(prompts) == {"image of prompt 0": "a.png"}


def test_images_are_checked_when_a_command_starts(tmp_path: Path) -> None:
    image = ImagePrompt("rain", write_image(tmp_path / "a.png", 0))
    texts = tiny_config(write(tmp_path / "t2v"))
    with pytest.raises(ValueError, match="texts alone"):
        check_images([image], texts)
    check_images(["rain"], texts)

    images = tiny_config(write(tmp_path / "i2v", IMAGES, {"in_channels": 36}))
    check_images([image], images)
    with pytest.raises(ValueError, match="this prompt has none: 'sun'"):
        check_images([image, "sun"], images)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"b\.png: no image"):
        check_images([image, ImagePrompt("sun", str(tmp_path / "b.png"))], images)
    # neither do the noised samples of a forward objective, nor pairs
    check_image_objective("policy", [image])
    with pytest.raises(ValueError, match="objective=nft"):
        check_image_objective("nft", ["sun", image])
    check_family(SimpleNamespace(generator=images, zero_stage=1))
    check_family(SimpleNamespace(generator=images, zero_stage=1), stochastic=True)


def test_ranks_do_not_share_a_video_with_a_time_for_each_token(tmp_path: Path) -> None:
    image = ImagePrompt("rain", write_image(tmp_path / "a.png", 0))
    folder = write(tmp_path / "ti2v", {"expand_timesteps": True})
    cfg = tiny_config(folder, context_parallel=2)
    check_images(["rain"], cfg)
    with pytest.raises(ValueError, match="context_parallel=2 must be 1"):
        check_images([image], cfg)
    clip = {"image_encoder": ["transformers", "CLIPVisionModel"]}
    i2v = write(
        tmp_path / "i2v", {**IMAGES, **clip}, {"in_channels": 36, "image_dim": 1280}
    )
    both = SimpleNamespace(generator=tiny_config(i2v, context_parallel=2), zero_stage=1)
    with pytest.raises(ValueError, match="tokens of an image"):
        check_family(both, stochastic=True)


def test_class_of_another_generator_says_that_it_takes_images() -> None:
    prompts = ["a red room", ImagePrompt("a blue room", "blue.png")]
    own = SimpleNamespace(target="own.py:Own")
    with pytest.raises(ValueError, match="'a blue room' has an image"):
        check_takes_images(own, object(), prompts)
    check_takes_images(own, SimpleNamespace(takes_images=True), prompts)
    check_takes_images(own, object(), prompts[:1])
