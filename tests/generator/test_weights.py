"""Full fine-tuning: what is saved is a transformer that stock diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from generator import weights
from generator.wan import WanGenerator
from tests.tiny import tiny_config, tiny_generator

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def tuned(folder: Path) -> WanGenerator:
    """Every weight moved a little."""
    generator = WanGenerator.load(tiny_config(folder, lora=None), device="cpu")
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in generator.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return generator


def test_stock_diffusers_reads_the_weights(tuned: WanGenerator, tmp_path: Path) -> None:
    file = tuned.save_trained(tmp_path)
    assert file == tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    stock, info = WanTransformer3DModel.from_pretrained(
        tmp_path, subfolder="transformer", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want = tuned.module.state_dict()
    assert all(
        torch.equal(weight, want[name]) for name, weight in stock.state_dict().items()
    )
    assert len(want) == len(stock.state_dict())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_weights_load_under_an_adapter(
    tuned: WanGenerator, folder: Path, tmp_path: Path, *, with_adapter: bool
) -> None:
    want = tuned.sample([PROMPT], [1])
    tuned.save_trained(tmp_path)
    options = {} if with_adapter else {"lora": None}
    other = WanGenerator.load(tiny_config(folder, **options), device="cpu")
    assert not torch.equal(other.sample([PROMPT], [1]), want)
    other.load_trained(tmp_path)  # an adapter that was never trained adds nothing
    torch.testing.assert_close(other.sample([PROMPT], [1]), want, rtol=1e-5, atol=1e-5)


def test_weights_of_another_model_raise(tuned: WanGenerator, tmp_path: Path) -> None:
    file = tuned.save_trained(tmp_path)
    state = load_file(file)
    state["proj_out.bias"] = state["proj_out.bias"][:-1].clone()
    state["proj_in.bias"] = state.pop("patch_embedding.bias")
    save_file(state, file)
    with pytest.raises(ValueError, match="3") as error:
        tuned.load_trained(tmp_path)
    for words in (
        "unexpected proj_in.bias",
        "missing patch_embedding.bias",
        "proj_out.bias is (63,), want (64,)",
    ):
        assert words in str(error.value)


def test_adapter_load_without_lora_raises(
    tuned: WanGenerator, folder: Path, tmp_path: Path
) -> None:
    tiny_generator(folder).save_trained(tmp_path)
    with pytest.raises(ValueError, match="null"):
        tuned.load_trained(tmp_path)


def test_half_precision_is_of_all_weights_and_of_no_buffer(folder: Path) -> None:
    generator = WanGenerator.load(
        tiny_config(folder, lora=None, dtype="bfloat16"), device="cpu"
    )
    assert {p.dtype for p in generator.module.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype != torch.bfloat16 for buffer in generator.module.buffers())
    exact = WanGenerator.load(tiny_config(folder, lora=None), device="cpu").sample(
        [PROMPT], [1]
    )
    assert float((generator.sample([PROMPT], [1]) - exact).norm() / exact.norm()) < 0.1
    (group,) = generator.rollout([PROMPT], group_size=2, seeds=[1])
    with torch.no_grad(), generator.reference():
        law = generator.transition(PROMPT, group.steps[0])
    with torch.no_grad():
        assert torch.equal(
            generator.transition(PROMPT, group.steps[0]).mean, law.mean
        )  # the copy is as coarse


def test_shards_load_in_stock_diffusers_and_generator(
    tuned: WanGenerator, tmp_path: Path
) -> None:
    tuned.save_trained(tmp_path / "one")
    written = json.loads((tmp_path / "one/transformer/config.json").read_text())
    assert written["_name_or_path"]  # where this machine had it
    stored = weights.read(tmp_path / "one")
    assert "_name_or_path" not in stored.config
    state = {
        name: tensor.bfloat16() if "ffn" in name else tensor
        for name, tensor in stored.state.items()
    }
    files = weights.write(
        weights.Stored(stored.config, state), tmp_path / "many", max_shard=20_000
    )
    assert len(files) > 2
    again = weights.read(tmp_path / "many")
    assert again.config == stored.config
    assert again.state.keys() == state.keys()
    assert all(
        torch.equal(again.state[n], t) and again.state[n].dtype == t.dtype
        for n, t in state.items()
    )
    stock, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "many", subfolder="transformer", output_loading_info=True
    )
    assert not any(info.values())
    assert all(
        torch.equal(weight, state[name].float())
        for name, weight in stock.state_dict().items()
    )
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=files[0].name):
        weights.read(tmp_path / "many")


def test_weights_misfitting_their_config_raise(
    tuned: WanGenerator, tmp_path: Path
) -> None:
    file = tuned.save_trained(tmp_path)
    state = load_file(file)
    save_file(
        {name: tensor for name, tensor in state.items() if name != "proj_out.bias"},
        file,
    )
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        weights.read(tmp_path)
    (file.parent / "config.json").write_text(
        '{"_class_name": "CogVideoXTransformer3DModel"}'
    )
    with pytest.raises(ValueError, match="CogVideoXTransformer3DModel"):
        weights.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.read(tmp_path / "none")


@pytest.mark.parametrize("place", [0, -1])
def test_damaged_transformer_is_refused_by_both_readers(
    tuned: WanGenerator, tmp_path: Path, place: int
) -> None:
    """NaN and a cut file, for sampling and for export; nothing is overwritten."""
    file = tuned.save_trained(tmp_path)
    before = {name: w.clone() for name, w in tuned.module.state_dict().items()}
    state = load_file(file)
    name = sorted(state)[place]
    state[name].view(-1)[place] = torch.nan
    save_file(state, file)
    for read in (tuned.load_trained, weights.read):
        with pytest.raises(ValueError, match="NaN") as caught:
            read(tmp_path)
        assert name in str(caught.value)
        assert str(file.parent) in str(caught.value)
    file.write_bytes(file.read_bytes()[:-1])
    for read in (tuned.load_trained, weights.read):
        with pytest.raises(ValueError, match="whole safetensors file"):
            read(tmp_path)
    after = tuned.module.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
