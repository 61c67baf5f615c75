"""Pairs of videos that begin with an image: stored with the image, trained without its file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.config import DpoConfig, PairConfig
from alignment.dpo import DpoLoop
from alignment.pair_store import LatentPair, PairSet, write_pairs
from common.types import ImagePrompt
from generator.conditions import ImageCondition, check_alike
from generator.wan import WanGenerator
from launch.training.dpo_loop import check_fit
from launch.training.pair_making import PairOutput, make_pairs
from tests.fakes import FunctionReward, PlainEngine, redness
from tests.generator.families import build_family, write_image
from tests.generator.test_conditions import KINDS, config
from tests.generator.test_wan_folder import write as write_wan
from tests.launch.processes import ROOT, run
from tests.tiny import tiny_config

PROMPTS = ("rain", "a cat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: build_family(root / kind, kind) for kind in KINDS}


def image_prompts(folder: Path) -> list[ImagePrompt]:
    files = [write_image(folder / f"{seed}.png", seed) for seed in (0, 1)]
    texts = zip(PROMPTS, files, strict=True)
    return [ImagePrompt(text, file) for text, file in texts]


def make(folder: Path, generator: WanGenerator, prompts: list[Any]) -> PairSet:
    make_pairs(
        PairOutput(folder, {}, "none"),
        prompts,
        generator,
        {"red": FunctionReward("red", redness)},
        {"red": 1.0},
        how=PairConfig(candidates=2),
        seed=0,
    )
    return PairSet(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stored_pairs_train_as_their_images_would(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    cfg = config(folders, kind)
    prompts = image_prompts(tmp_path)
    generator = WanGenerator.load(cfg, device="cpu")
    pairs = make(tmp_path / "pairs", generator, prompts)
    check_fit(pairs, cfg)
    batch = pairs.read([0, 1])
    assert batch.prompts == tuple(prompts)
    noise = torch.randn(
        batch.chosen_NCFHW.shape, generator=torch.Generator().manual_seed(0)
    )
    # the first transformer's, where there are two
    sigma_N = torch.tensor([0.93, 0.98])
    want_N = generator.flow_error(batch.chosen_NCFHW, noise, sigma_N, prompts)

    # Without encoders and without the files.
    for prompt in prompts:
        Path(prompt.image).unlink()
    trained = WanGenerator.load(cfg, device="cpu", transformer_only=True)
    trained.module.load_state_dict(generator.module.state_dict())
    with trained.given_prompts(batch.embeddings, batch.images):
        error_N = trained.flow_error(batch.chosen_NCFHW, noise, sigma_N, batch.prompts)
    assert torch.equal(error_N, want_N)
    no_vae = pytest.raises(RuntimeError, match="without its VAE")
    with trained.given_prompts(batch.embeddings), no_vae:
        trained.flow_error(batch.chosen_NCFHW, noise, sigma_N, batch.prompts)

    # The other prompt's image is another error.
    swapped = [
        ImagePrompt(prompt.text, prompts[1 - i].image)
        for i, prompt in enumerate(prompts)
    ]
    with trained.given_prompts(batch.embeddings, batch.images):
        other_N = trained.flow_error(batch.chosen_NCFHW, noise, sigma_N, swapped)
    assert (other_N - want_N).abs().min() > 1e-4


def test_given_first_frame_has_no_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """By hand over the free frames; the first frame's latent and noise change nothing."""
    generator = WanGenerator.load(config(folders, "TI2V-5B"), device="cpu")
    prompts = image_prompts(tmp_path)[:1]
    shape = (1, *generator.latent_shape)
    source = torch.Generator().manual_seed(0)
    clean = torch.randn(shape, generator=source)
    noise = torch.randn(shape, generator=source)
    sigma = torch.tensor([0.4])
    error = generator.flow_error(clean, noise, sigma, prompts)

    free = 0.6 * clean[:, :, 1:] + 0.4 * noise[:, :, 1:]
    v = generator.velocity(free, sigma, prompts, guidance_scale=1.0)
    by_hand = (v - (noise - clean)[:, :, 1:]).square().mean()
    assert error.item() == pytest.approx(by_hand.item(), rel=1e-6)
    for tensor in (clean, noise):
        tensor[:, :, 0] = 7.0
    assert torch.equal(generator.flow_error(clean, noise, sigma, prompts), error)


@pytest.mark.parametrize("kind", ["I2V-A14B", "I2V-14B"])
def test_dpo_step_uses_the_stored_images(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The first DPO step has the loss ln 2, and its gradient follows the images."""
    cfg = config(folders, kind)
    generator = WanGenerator.load(cfg, device="cpu")
    pairs = make(tmp_path / "pairs", generator, image_prompts(tmp_path))
    trained = WanGenerator.load(cfg, device="cpu", transformer_only=True)
    parameters = [p for p in trained.module.parameters() if p.requires_grad]
    loop = DpoLoop(
        DpoConfig(pairs_per_step=2, micro_batch=2),
        generator=trained,
        engine=PlainEngine(trained.module, accumulation=1, lr=1e-3),
        pairs=pairs,
        seed=0,
        accepts=trained.trains_at,
    )
    before = [p.detach().clone() for p in parameters]
    metrics = loop.step(0)
    assert metrics["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    moved = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
    assert any(moved)


def stored(folder: Path, prompt: Any, condition: ImageCondition | None) -> PairSet:
    """A set of one pair."""
    latent = torch.zeros(16, 2, 4, 4)
    pair = LatentPair(
        prompt,
        latent,
        latent + 1,
        torch.zeros(1, 2),
        condition={} if condition is None else condition.tensors(),
    )
    write_pairs(folder, iter([pair]), per_shard=1, dtype=torch.float32, about={})
    return PairSet(folder)


def test_index_of_texts_says_nothing_of_images(tmp_path: Path) -> None:
    stored(tmp_path, "rain", None)
    (line,) = (tmp_path / "index.jsonl").read_text().splitlines()
    assert not {"image", "condition"} & set(json.loads(line))


def test_pairs_of_another_kind_of_model_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    image = ImagePrompt("rain", "a.png")
    channels = ImageCondition(torch.zeros(16, 2, 4, 4))
    clip = ImageCondition(channels.latent_CFHW, torch.zeros(257, 8))
    first = ImageCondition(torch.zeros(48, 1, 4, 4))
    sets = {
        "texts": stored(tmp_path / "texts", "rain", None),
        "I2V-A14B": stored(tmp_path / "channels", image, channels),
        "I2V-14B": stored(tmp_path / "clip", image, clip),
        "TI2V-5B": stored(tmp_path / "first", image, first),
    }
    for kind in KINDS:
        cfg = config(folders, kind)
        for name, pairs in sets.items():
            # TI2V takes texts too
            if name == kind or (kind, name) == ("TI2V-5B", "texts"):
                check_fit(pairs, cfg)
                continue
            problem = "this prompt has none" if name == "texts" else "another kind"
            with pytest.raises(ValueError, match=problem) as caught:
                check_fit(pairs, cfg)
            assert str(pairs.folder) in str(caught.value)
    texts = tiny_config(write_wan(tmp_path / "t2v"))
    check_fit(sets["texts"], texts)
    with pytest.raises(ValueError, match="texts alone"):
        check_fit(sets["I2V-14B"], texts)
    with pytest.raises(ValueError, match="1 of 2 prompts have none"):
        check_alike([image, "rain"])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["TI2V-5B", "I2V-14B"])
def test_pairs_dpo_and_evaluation_of_images(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The commands: pairs of images, Flow-DPO on them without the files, an evaluation."""
    prompts = image_prompts(tmp_path)
    lines = [{"prompt": p.text, "image": Path(p.image).name} for p in prompts]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    generator = asdict(config(folders, kind))
    generator = {key: value for key, value in generator.items() if value is not None}
    both = {"generator": generator, "seed": 0}
    rewards = {"brightness": {}}
    pairs = {
        **both,
        "rewards": rewards,
        "prompts": str(file),
        "pairs": {"candidates": 2},
    }
    write(tmp_path / "pairs.yaml", {**pairs, "out": str(tmp_path / "pairs")})
    words = ["--config", str(tmp_path / "pairs.yaml")]
    run("python", str(ROOT / "launch/pairs.py"), *words)
    (tmp_path / "0.png").rename(tmp_path / "kept.png")
    dpo = {
        **both,
        "pairs": str(tmp_path / "pairs"),
        "run_dir": str(tmp_path / "dpo"),
        "dpo": {"pairs_per_step": 2, "epochs": 2},
    }
    write(tmp_path / "dpo.yaml", dpo)
    run("python", str(ROOT / "launch/dpo.py"), "--config", str(tmp_path / "dpo.yaml"))
    (tmp_path / "kept.png").rename(tmp_path / "0.png")
    evaluation = {**both, "rewards": rewards, "prompts": str(file)}
    evaluation |= {
        "out": str(tmp_path / "eval"),
        "adapter": str(tmp_path / "dpo/final"),
    }
    write(tmp_path / "evaluate.yaml", evaluation)
    words = ["generator", "--config", str(tmp_path / "evaluate.yaml")]
    run("python", str(ROOT / "launch/evaluate.py"), *words)
    rows = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == list(PROMPTS)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a config."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
