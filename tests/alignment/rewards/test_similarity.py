"""Rewards by CLIP and SigLIP equal the logits of the real classes with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from alignment.rewards.similarity import Similarity
from tests.tiny import byte_tokenizer

PROMPTS = [
    "a red circle",
    "two cats, and a dog that is much too long for the text tower of a model",
    "rain",
]
VIDEO = torch.randint(
    0,
    256,
    (3, 5, 40, 56, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint as the hub has them."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_tokenizer()
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**common, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {
        "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**common, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "clip":
        text["projection_dim"] = vision["projection_dim"] = 8
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        )
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def by_another_route(folder: Path, places: list[int]) -> torch.Tensor:
    """(B, K) cosines from the whole model's logits, one image and one text at a time."""
    reward = Similarity(folder)
    model, rows = reward.model, []
    is_clip = model.config.model_type == "clip"
    for video, prompt in zip(VIDEO, PROMPTS, strict=True):
        pixels = reward.processor(
            images=[video[i].numpy() for i in places], return_tensors="pt"
        ).pixel_values
        tokens = reward.tokenizer(
            [prompt],
            truncation=True,
            max_length=24,
            padding=True if is_clip else "max_length",
        )
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(tokens["input_ids"]), pixel_values=pixels
            )
        scale, bias = model.logit_scale.exp(), 0.0 if is_clip else model.logit_bias
        rows.append(((out.logits_per_image - bias) / scale)[:, 0].detach())
    return torch.stack(rows)


def test_similarity_equals_the_models_cosine(folder: Path) -> None:
    (reward,) = build_rewards(
        {"similarity": RewardConfig(checkpoint=str(folder), options={"frames": 3})}
    ).values()
    cosine_BK = by_another_route(folder, [0, 2, 4])
    value_B = reward.score(VIDEO, PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(value_B, cosine_BK.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert float(value_B.std()) > 1e-3
    best = Similarity(folder, frames=3, best=0.3).score(VIDEO, PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(best, cosine_BK.max(dim=1).values, rtol=1e-4, atol=1e-5)


def test_similarity_depends_on_prompt_and_frames_not_order(folder: Path) -> None:
    reward, order = Similarity(folder, batch=4), [2, 0, 1]
    plain = reward.score(VIDEO, PROMPTS, fps=8.0).value_B
    turned = reward.score(VIDEO[order], [PROMPTS[i] for i in order], fps=8.0).value_B
    torch.testing.assert_close(turned, plain[order], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        reward.score(VIDEO, PROMPTS[1:] + PROMPTS[:1], fps=8.0).value_B,
        plain,
        atol=1e-4,
    )
    assert not torch.allclose(
        reward.score(VIDEO[order], PROMPTS, fps=8.0).value_B, plain, atol=1e-4
    )
    short = reward.score(VIDEO[:, :2], PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(
        short, by_another_route(folder, [0, 1]).mean(dim=1), rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\b0\b"):
        Similarity(folder, best=0)
    with pytest.raises(ValueError, match="checkpoint"):
        build_rewards({"similarity": RewardConfig()})
