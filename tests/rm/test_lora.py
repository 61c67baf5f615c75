"""A bfloat16 checkpoint keeps its adapter apart; an fp32 checkpoint has it merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from common.lora import LowRank, MergeLoss, adapters_off
from rm.config import BackboneLora, LearningRates
from rm.convert import release
from rm.lora import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    AdaptedLinear,
    read_peft_adapter,
    save_adapter,
    split_state,
)
from rm.model import Batch, DeScore
from rm.video import prepare
from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, save_tiny_qwen

BF16 = torch.bfloat16
# B's spread after 1,375 random steps of lr 2e-6
SMALL = 7.4e-5
LORA = BackboneLora(rank=64, alpha=128.0, dropout=0.0)
LAYER = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("base"))


def trained(base: Path, *, std: float, dtype: torch.dtype = BF16) -> DeScore:
    """A reward model in the middle of its training, with B of this spread."""
    model = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS, dtype=dtype)
    model.param_groups(LearningRates(), lora=LORA, weight_decay=0.0)
    return with_trained_lora(model, std)


@torch.no_grad()
def with_trained_lora(model: DeScore, std: float) -> DeScore:
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
    return model.eval()


@pytest.fixture(scope="module")
def batch(base: Path) -> Batch:
    model = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS)
    videos = [prepare(random_frames(i), SETTINGS, fps=4.0) for i in range(8)]
    encoded = [model.encode(f"ball {i}", v, "a CoT") for i, v in enumerate(videos)]
    return model.batch(encoded, videos)


@torch.no_grad()
def rewards(model: DeScore, batch: Batch, *, adapter: bool = True) -> torch.Tensor:
    """In fp32, whatever the weights are."""
    wide = copy.deepcopy(model).float()
    if adapter:
        return wide(batch)
    with adapters_off(wide):
        return wide(batch)


@torch.no_grad()
@pytest.mark.parametrize(("std", "merged"), [(SMALL, 0.5), (3e-4, 0.1), (1e-3, 0.03)])
def test_saved_bf16_adapter_loses_nothing_where_merging_loses_much(
    base: Path, batch: Batch, tmp_path: Path, std: float, merged: float
) -> None:
    model = trained(base, std=std)
    want = rewards(model, batch)
    effect = (want - rewards(model, batch, adapter=False)).norm()
    model.save(tmp_path)
    loaded = DeScore.load(tmp_path)
    assert (loaded(batch) - want).norm() < 1e-3 * effect

    # what a merge into bfloat16 would do to the same rewards
    state = split_state(model.backbone, model.state_dict())
    rounded = loaded.backbone.state_dict()
    for name, pair in state.adapter.items():
        rounded[name].copy_(MergeLoss().merge(state.weights[name], pair))
    assert (loaded(batch) - want).norm() > merged * effect


@torch.no_grad()
def test_loaded_bf16_model_computes_what_training_computed(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    model = trained(base, std=1e-2)
    model.save(tmp_path)
    loaded = DeScore.load(tmp_path, dtype=BF16)
    assert torch.equal(loaded(batch), model(batch))
    ids = batch.ids_BL[:1, :20]
    assert torch.equal(loaded.backbone(ids).logits, model.backbone(ids).logits)
    # the base's weights are untouched
    layer = loaded.backbone.get_submodule(LAYER)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=BF16)
    assert isinstance(layer, AdaptedLinear)
    assert torch.equal(layer.weight, stock.get_submodule(LAYER).weight)
    assert layer.adapter_B.dtype == BF16


@torch.no_grad()
def test_stock_loaders_apply_the_adapter(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    """transformers by itself, and peft on the folder's stock part."""
    model = trained(base, std=1e-2)
    model.save(tmp_path)
    ids = batch.ids_BL[:1, :20]
    want = copy.deepcopy(model.backbone).float()(ids).logits
    float32 = torch.float32
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=float32)
    torch.testing.assert_close(stock(ids).logits, want, atol=1e-5, rtol=1e-5)

    plain = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=BF16).float()
    assert (plain(ids).logits - want).abs().max() > 1e-2
    with_peft = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(with_peft(ids).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stage_2_starts_from_the_trained_model_and_keeps_it_as_reference(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    model = trained(base, std=1e-2)
    want = model(batch)
    model.save(tmp_path / "stage1")

    # a second LoRA, switched off: the model of stage 1
    second = DeScore.load(tmp_path / "stage1", dtype=BF16)
    lora = BackboneLora(rank=2, alpha=3.0, dropout=0.0)
    groups = second.param_groups(LearningRates(), lora=lora, weight_decay=0.0)
    assert torch.equal(second.eval()(batch), want)
    assert len(groups[0]["params"]) == 2 * 7 * 2
    with_trained_lora(second, 0.1)
    moved = rewards(second, batch)
    with adapters_off(second):
        assert torch.equal(second(batch), want)
    # both are in what it saves: 64 + 2 ranks
    second.save(tmp_path / "stage2")
    assert (moved - want).abs().max() > 1e-2
    again = DeScore.load(tmp_path / "stage2")
    torch.testing.assert_close(again(batch), moved, atol=1e-5, rtol=0)
    pair = read_peft_adapter(tmp_path / "stage2")[f"{LAYER}.weight"]
    assert (len(pair.a_RI), pair.scaling) == (66, 1.0)


def test_full_training_of_stage_2_leaves_the_adapter_as_it_is(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    trained(base, std=1e-2).save(tmp_path / "stage1")
    model = DeScore.load(tmp_path / "stage1", dtype=BF16)
    model.param_groups(LearningRates(), lora=None, weight_decay=0.0)
    layer = model.backbone.get_submodule(LAYER)
    assert layer.weight.requires_grad
    assert not layer.adapter_A.requires_grad
    assert not layer.adapter_B.requires_grad
    model(batch).sum().backward()
    assert layer.weight.grad.abs().sum() > 0

    with torch.no_grad():
        layer.weight.add_(0.1)
        model.eval().save(tmp_path / "stage2")
        again = DeScore.load(tmp_path / "stage2", dtype=BF16)
        assert torch.equal(again(batch), model(batch))
    first, second = (
        load_file(tmp_path / n / ADAPTER_FILE) for n in ("stage1", "stage2")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_export_merges_and_measures_what_rounding_takes(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    model = trained(base, std=SMALL)
    model.save(tmp_path / "final")
    folder = release.inspect(tmp_path / "final")
    lost = release.copy_release(folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(tmp_path / "final" / "model.safetensors")

    # by hand, in numpy's float64
    square = total = 0.0
    for name, layer in model.backbone.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = (
            part["default"].weight.double().numpy()
            for part in (layer.lora_A, layer.lora_B)
        )
        change = 2.0 * b @ a
        found = merged[f"{name}.weight"].double().numpy()
        plain = stored[f"{name}.weight"].double().numpy()
        square += ((found - plain - change) ** 2).sum()
        total += (change**2).sum()
    assert lost == pytest.approx((square / total) ** 0.5, rel=1e-3)
    assert 0.5 < lost < 1.0
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()
    assert not any("adapter_" in name for name in merged)
    # the copy is what the merge has made of it
    effect = rewards(model, batch) - rewards(model, batch, adapter=False)
    error = DeScore.load(tmp_path / "out")(batch) - rewards(model, batch)
    assert error.norm() > 0.5 * effect.norm()


def test_merge_loss_by_hand() -> None:
    """256 + 1 is 257, half-way between bfloat16's 256 and 258; 256 + 2 is exact."""
    loss = MergeLoss()
    weight = torch.tensor([[256.0, 256.0]], dtype=BF16)
    pair = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]), 2.0)
    merged = loss.merge(weight, pair)
    assert merged.tolist() == [[256.0, 258.0]]
    assert loss.share == pytest.approx((1 / 5) ** 0.5)
    assert MergeLoss().share == 0.0


@torch.no_grad()
def test_fp32_checkpoint_is_merged_and_removes_an_older_adapter(
    base: Path, batch: Batch, tmp_path: Path
) -> None:
    trained(base, std=1e-2).save(tmp_path)
    assert (tmp_path / ADAPTER_CONFIG).is_file()
    model = trained(base, std=1e-2, dtype=torch.float32)
    model.save(tmp_path)
    assert not (tmp_path / ADAPTER_CONFIG).exists()
    assert not (tmp_path / ADAPTER_FILE).exists()
    loaded = DeScore.load(tmp_path)
    torch.testing.assert_close(loaded(batch), model(batch), atol=1e-5, rtol=0)


def test_adapter_that_does_not_fit_raises(base: Path, tmp_path: Path) -> None:
    trained(base, std=1e-2).save(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    tensors = load_file(tmp_path / ADAPTER_FILE)
    key = f"base_model.model.{LAYER}.lora_B.weight"

    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words):
            DeScore.load(tmp_path, dtype=BF16)

    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    refused("use_dora")
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, "r": 3}))
    refused("r=3")
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    for changed, words in (
        (tensors[key][:-1], r"up_proj\.weight is to be changed as \(47, 32\)"),
        (tensors[key] * float("nan"), "NaN"),
    ):
        save_file({**tensors, key: changed.contiguous()}, tmp_path / ADAPTER_FILE)
        refused(words)
    (tmp_path / ADAPTER_FILE).write_bytes(b"half")
    refused(ADAPTER_FILE)
    (tmp_path / ADAPTER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_FILE):
        DeScore.load(tmp_path, dtype=BF16)


def test_adapter_of_layers_that_differ_in_rank_cannot_be_saved(tmp_path: Path) -> None:
    adapter = {
        f"{name}.weight": LowRank(torch.zeros(rank, 4), torch.zeros(4, rank), 1.0)
        for name, rank in (("a", 1), ("b", 2))
    }
    with pytest.raises(ValueError, match="rank"):
        save_adapter(tmp_path, adapter)


def test_adapter_without_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    """A half-finished download; without the config the adapter would be left out."""
    trained(base, std=1e-2).save(tmp_path)
    (tmp_path / ADAPTER_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_CONFIG):
        DeScore.load(tmp_path, dtype=BF16)


@pytest.mark.parametrize("query_id", [-1, 10**7, 2.5, "264", None, True])
def test_query_id_that_is_no_row_is_refused(
    base: Path, tmp_path: Path, query_id: object
) -> None:
    trained(base, std=1e-2).save(tmp_path)
    record = json.loads((tmp_path / "descore.json").read_text())
    text = json.dumps({**record, "query_id": query_id})
    (tmp_path / "descore.json").write_text(text)
    with pytest.raises(ValueError, match="query_id"):
        DeScore.load(tmp_path, dtype=BF16)


def test_merged_weight_beyond_its_dtype_is_an_error() -> None:
    pair = LowRank(torch.full((1, 2), 1e20), torch.full((2, 1), 1e20), 1.0)
    with pytest.raises(ValueError, match=r"to_q.*bfloat16"):
        MergeLoss().merge(torch.zeros(2, 2, dtype=BF16), pair, name="to_q")
