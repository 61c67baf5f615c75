"""The shipped tiny weights are small, have stock layouts and the README's accuracy."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "shapes"


def test_assets_are_small_without_pickle() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 10**6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_stock_loaders_read_them() -> None:
    from diffusers import WanPipeline
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    pipeline = WanPipeline.from_pretrained(ASSETS / "wan", dtype=torch.float32)
    names = [
        type(part).__name__
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    ]
    assert names == ["WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"]
    model = AutoModelForImageTextToText.from_pretrained(
        ASSETS / "qwen", dtype=torch.float32
    )
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert AutoTokenizer.from_pretrained(ASSETS / "qwen").decode([0])


def test_stock_loader_reads_the_flow_map() -> None:
    """Its VAE, text encoder and tokenizer are links to those of the Wan."""
    from diffusers import AnyFlowPipeline

    folder = ASSETS / "anyflow"
    pipeline = AnyFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    assert type(pipeline.transformer).__name__ == "AnyFlowTransformer3DModel"
    assert pipeline.scheduler.config.shift == 3.0
    links = sorted(path.name for path in folder.iterdir() if path.is_symlink())
    assert links == ["text_encoder", "tokenizer", "vae"]
    measured = json.loads((ASSETS / "anyflow.measured.json").read_text())
    # no guidance and four forwards, against four guided steps: eight forwards
    assert measured["oracle_jumps_4"] > measured["oracle_teacher_4"] - 0.05
    assert measured["oracle_jumps_1"] > measured["oracle_teacher_1"] + 0.05


@pytest.mark.slow
def test_vae_preserves_oracle_attributes() -> None:
    from diffusers import AutoencoderKLWan

    from toy.build_vae import evaluate

    vae = AutoencoderKLWan.from_pretrained(ASSETS / "wan" / "vae").float().eval()
    measured = evaluate(vae, count=128, seed=11)
    assert measured["psnr_db"] >= 25.0
    assert measured["oracle_agreement"] >= 0.97


@pytest.mark.slow
def test_the_vision_language_model_sees_every_attribute() -> None:
    from rm.model import DeScore
    from toy.build_qwen import evaluate
    from toy.lessons import examples
    from toy.world import VALUES

    videos, wishes = examples(192, random.Random(12), clean=True)
    measured = evaluate(DeScore.from_base(ASSETS / "qwen"), videos, wishes, seed=12)
    # 0.95 was measured on 512; a sample of 192 may be lower by its noise, two sigma.
    assert {name: measured[name] for name in VALUES} == pytest.approx(
        dict.fromkeys(VALUES, 1.0), abs=0.05 + 0.03
    )
    assert measured["parsed"] >= 0.95


def test_train_and_heldout_prompts_share_no_combination() -> None:
    from toy.world import parse, split_attributes

    read = {
        name: {
            parse(line)
            for line in (ASSETS / f"prompts_{name}.txt").read_text().splitlines()
        }
        for name in ("train", "heldout")
    }
    assert not read["train"] & read["heldout"]
    train, heldout = split_attributes()
    assert read["train"] == set(train)
    assert read["heldout"] <= set(heldout)
    assert len((ASSETS / "prompts_heldout.txt").read_text().splitlines()) >= 200


def test_shuffled_annotations_teach_nothing() -> None:
    """The control of `toy/build.py --stages shuffled`: it sees as well, and cannot score."""
    taught = json.loads((ASSETS / "qwen.measured.json").read_text())
    shuffled = json.loads((ASSETS / "shuffled.measured.json").read_text())
    assert shuffled["wan_color"] == pytest.approx(taught["wan_color"], abs=0.05)
    assert shuffled["parsed"] > 0.95
    for name in ("scores", "wan_scores"):
        assert shuffled[name] < taught[name] - 0.15
