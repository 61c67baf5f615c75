"""The adapter: what trains, and a file that stock diffusers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from generator.adapter import _in_blocks
from generator.adapter_file import ADAPTER_FILE
from generator.config import WAN_LINEARS, LoraConfig
from generator.wan import WanGenerator
from tests.generator.stock import remarks
from tests.tiny import tiny_config, tiny_generator


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of `tiny_generator`: rank 4, alpha 8, random B."""
    target = tmp_path_factory.mktemp("adapter")
    assert tiny_generator(folder).save_trained(target) == target / ADAPTER_FILE
    return target


def test_only_adapter_weights_are_trainable(folder: Path) -> None:
    generator = WanGenerator.load(tiny_config(folder, dtype="bfloat16"), device="cpu")
    trainable = [p for p in generator.module.parameters() if p.requires_grad]
    # 2 blocks of 8 attention linears 24 -> 24 and a feed-forward 24 -> 32 -> 24:
    # each has r (in + out) parameters with r = 4.
    assert sum(p.numel() for p in trainable) == 2 * 4 * (8 * (24 + 24) + 2 * (24 + 32))
    assert {p.dtype for p in trainable} == {torch.float32}
    assert not any(p.requires_grad for p in generator.codec.vae.parameters())


def test_initial_values(folder: Path) -> None:
    """A is N(0, 1 / rank^2) from the seed, B is zero, so the model starts as it was."""
    one, same, other = (
        WanGenerator.load(
            tiny_config(folder, lora=LoraConfig(rank=16, alpha=8.0)),
            device="cpu",
            seed=seed,
        )
        for seed in (1, 1, 2)
    )
    weights = [dict(g.module.named_parameters()) for g in (one, same, other)]
    down = [name for name in weights[0] if ".lora_A." in name]
    values = torch.cat([weights[0][name].detach().flatten() for name in down])
    assert values.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in down)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in down)
    assert all((p == 0).all() for name, p in weights[0].items() if ".lora_B." in name)


def test_misspelt_target_is_refused(folder: Path) -> None:
    lora = LoraConfig(
        rank=2, targets=("to_q", "q_proj", "to_out")
    )  # to_out is a list of modules, not a linear
    with pytest.raises(ValueError, match="'q_proj'"):
        WanGenerator.load(tiny_config(folder, lora=lora), device="cpu")


def test_given_weights_replace_the_modules(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    generator = tiny_generator(folder)
    doubled = {
        name: 2 * p
        for name, p in generator.module.named_parameters()
        if p.requires_grad
    }
    generator.save_trained(tmp_path, doubled)
    own, given = load_file(saved / ADAPTER_FILE), load_file(tmp_path / ADAPTER_FILE)
    assert own.keys() == given.keys()
    assert all(torch.equal(given[name], 2 * own[name]) for name in own)


def test_stock_pipeline_reads_the_adapter(folder: Path, saved: Path) -> None:
    generator = tiny_generator(folder)
    stock = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    before = {name for name, _ in stock.transformer.named_parameters()}
    with remarks() as said:
        stock.load_lora_weights(saved, adapter_name="tuned")
    assert said == []
    found = {
        name.replace(".tuned.", "."): value.detach()
        for name, value in stock.transformer.named_parameters()
        if ".lora_" in name
    }
    written = {
        name.removeprefix("transformer."): value
        for name, value in load_file(saved / ADAPTER_FILE).items()
    }
    assert found.keys() == written.keys()  # nothing unexpected, nothing missing
    assert len(written) == 2 * 2 * (2 * 4 + 2) < len(before)
    assert all(torch.equal(found[name], written[name]) for name in written)

    draw = torch.Generator().manual_seed(4)
    x, sigma = torch.randn(1, *generator.latent_shape, generator=draw), 0.6
    texts = generator.prompts.get(
        ["rain"], device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        theirs = stock.transformer(x, torch.tensor([1000 * sigma]), texts).sample
        ours = generator.velocity(
            x, torch.tensor([sigma]), ["rain"], guidance_scale=1.0
        )
        stock.disable_lora()
        base = stock.transformer(x, torch.tensor([1000 * sigma]), texts).sample
    assert torch.allclose(
        ours, theirs, atol=1e-5
    )  # alpha is twice the rank: a lost alpha would halve the change
    assert (ours - base).abs().max() > 1e-2


def test_loaded_adapter_restores_the_output(folder: Path, saved: Path) -> None:
    trained, fresh = (
        tiny_generator(folder),
        WanGenerator.load(tiny_config(folder), device="cpu", seed=9),
    )
    want = trained.sample(["rain"], [1])
    assert not torch.allclose(fresh.sample(["rain"], [1]), want, atol=1e-2)
    fresh.load_trained(saved)
    assert torch.equal(fresh.sample(["rain"], [1]), want)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraConfig(rank=2, alpha=8.0), "r is 4, want 2"),
        (LoraConfig(rank=4, alpha=4.0), "lora_alpha is 8.0, want 4.0"),
        (
            LoraConfig(rank=4, alpha=8.0, targets=WAN_LINEARS[:4]),
            "unexpected blocks.0.ffn",
        ),
    ],
)
def test_misfitting_adapter_is_refused(
    folder: Path, saved: Path, lora: LoraConfig, words: str
) -> None:
    generator = WanGenerator.load(tiny_config(folder, lora=lora), device="cpu")
    with pytest.raises(ValueError, match="problems") as caught:
        generator.load_trained(saved)
    assert words in str(caught.value)


def test_adapter_without_a_weight_is_refused(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    with safe_open(saved / ADAPTER_FILE, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(saved / ADAPTER_FILE)
    gone = sorted(weights)[0]
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        tmp_path / ADAPTER_FILE,
        metadata,
    )
    with pytest.raises(ValueError, match=r"attn1\.to_k"):
        tiny_generator(folder).load_trained(tmp_path)


def test_missing_file_raises_with_its_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=ADAPTER_FILE):
        tiny_generator(folder).load_trained(tmp_path)


def test_targets_of_the_blocks_leave_out_layers_of_the_same_name() -> None:
    """A suffix that a block has means the blocks; one that no block has, and a full name, stay."""
    inside = [f".blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "ffn.net.2")]
    outside = [".image_embedder.ffn.net.2", ".condition_embedder.time_proj"]
    linears = [*inside, *outside]
    names = [name.removeprefix(".") for name in linears]
    # Nothing clashes: as the user wrote it.
    assert _in_blocks(linears, ["to_q", "time_proj"]) == ["to_q", "time_proj"]
    assert _in_blocks(linears, ["to_q", "ffn.net.2", "time_proj"]) == [
        names[0],
        names[2],
        names[1],
        names[3],
        "condition_embedder.time_proj",
    ]
    assert _in_blocks(linears, [names[4]]) == [names[4]]
