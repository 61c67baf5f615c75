"""Adapters in other layouts: stock diffusers and ComfyUI read what was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.lora import LoraScales, LowRank
from generator import adapter, adapter_file, weights
from generator.adapter_file import ADAPTER_FILE, StoredAdapter
from generator.config import WAN_LINEARS, LoraConfig
from generator.wan import WanGenerator
from tests.generator.stock import (
    WAN_1_3B,
    adapter_of,
    large_pipeline,
    latents,
    remarks,
    tiny_pipeline,
)
from tests.tiny import tiny_config, tiny_generator

# every linear that a Wan transformer has
EVERYWHERE = (*WAN_LINEARS, "linear_1", "linear_2", "time_proj", "proj_out")
COMFYUI = "comfyui.safetensors"


def stored(generator: WanGenerator, folder: Path) -> StoredAdapter:
    generator.save_trained(folder)
    return adapter_file.read(folder)


def write_comfyui(own: StoredAdapter, folder: Path) -> dict[str, torch.Tensor]:
    tensors = adapter_file.comfyui(own)
    save_file(tensors, folder / COMFYUI)
    return tensors


def change(own: StoredAdapter, linear: str) -> torch.Tensor:
    """What the adapter adds, in fp64."""
    pair = own.pairs[linear]
    scaling = own.scales.alpha / own.scales.rank
    return scaling * pair.b_OR.double() @ pair.a_RI.double()


def as_comfyui_adds(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply comfy/weight_adapter/lora.py in fp64: alpha / rank with an alpha, else 1."""
    out = {}
    for key in (key for key in tensors if key.endswith(".lora_B.weight")):
        name = key.removesuffix(".lora_B.weight")
        down = tensors[f"{name}.lora_A.weight"]
        scale = (
            tensors[f"{name}.alpha"].item() / down.shape[0]
            if f"{name}.alpha" in tensors
            else 1.0
        )
        out[f"{name.removeprefix('diffusion_model.')}.weight"] = (
            scale * tensors[key].double() @ down.double()
        )
    return out


@pytest.fixture(params=[8.0, 3.0], ids=["alpha 8 of rank 4", "alpha 3 of rank 4"])
def trained(request: pytest.FixtureRequest, folder: Path) -> WanGenerator:
    return tiny_generator(
        folder, lora=LoraConfig(rank=4, alpha=request.param, targets=EVERYWHERE)
    )


def test_comfyui_names_equal_diffusers_table(
    trained: WanGenerator, tmp_path: Path
) -> None:
    own = stored(trained, tmp_path)
    added = convert_wan_transformer_to_diffusers(
        as_comfyui_adds(adapter_file.comfyui(own))
    )
    assert added.keys() == {f"{linear}.weight" for linear in own.pairs}
    assert (
        len(added) == 2 * 10 + 6
    )  # two blocks, and time and text embedders (2 each), time projection, output
    worst = max(
        float((added[f"{linear}.weight"] - change(own, linear)).abs().max())
        for linear in own.pairs
    )
    assert worst < 1e-6


def test_diffusers_reads_comfyuis_layout(
    trained: WanGenerator, folder: Path, tmp_path: Path
) -> None:
    own = stored(trained, tmp_path)
    write_comfyui(own, tmp_path)
    read_back = WanPipeline.lora_state_dict(tmp_path, weight_name=COMFYUI)
    assert read_back.keys() == load_file(tmp_path / ADAPTER_FILE).keys()
    for linear in own.pairs:
        down, up = (
            read_back[f"transformer.{linear}.lora_{side}.weight"].double()
            for side in "AB"
        )
        torch.testing.assert_close(up @ down, change(own, linear), atol=1e-6, rtol=1e-5)

    pipeline = tiny_pipeline(folder)
    with remarks() as said:
        pipeline.load_lora_weights(tmp_path, weight_name=COMFYUI)
    assert said == []
    assert (
        adapter_of(pipeline).keys() == read_back.keys()
    )  # nothing unexpected, nothing missing
    want = trained.sample(
        ["rain", "a red circle"], [3, 4], scheduler="pipeline", num_steps=4
    )
    got = latents(pipeline, ["rain", "a red circle"], [3, 4], steps=4)
    torch.testing.assert_close(
        got, want, atol=1e-5, rtol=1e-5
    )  # latents are as large as 10
    pipeline.disable_lora()
    assert (
        latents(pipeline, ["rain", "a red circle"], [3, 4], steps=4) - want
    ).abs().max() > 0.1


def test_remarks_record_an_unexpected_key(folder: Path, tmp_path: Path) -> None:
    tiny_generator(folder).save_trained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    for side in "AB":
        name = f"transformer.blocks.0.attn1.to_q.lora_{side}.weight"
        tensors[name.replace("blocks.0", "blocks.9")] = tensors[name].clone()
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with remarks() as said:
        tiny_pipeline(folder).load_lora_weights(tmp_path)
    assert any("unexpected keys" in one and "blocks.9" in one for one in said)


def test_merged_transformer_equals_adapted(
    trained: WanGenerator, folder: Path, tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    base = weights.read(folder)
    merged = adapter_file.merge(base.state, stored(trained, tmp_path))
    weights.write(weights.Stored(base.config, merged.state), tmp_path)
    with remarks() as said:
        stock, info = WanTransformer3DModel.from_pretrained(
            tmp_path, subfolder="transformer", output_loading_info=True
        )
    assert said == []
    assert not any(info.values())
    x, sigma = (
        torch.randn(
            2, *trained.latent_shape, generator=torch.Generator().manual_seed(4)
        ),
        0.6,
    )
    texts = trained.prompts.get(
        ["rain", "two cats"], device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        want = trained.velocity(
            x, torch.tensor([sigma, sigma]), ["rain", "two cats"], guidance_scale=1.0
        )
        got = stock.eval()(x, torch.tensor([1000 * sigma] * 2), texts).sample
        with trained.reference():
            before = trained.velocity(
                x,
                torch.tensor([sigma, sigma]),
                ["rain", "two cats"],
                guidance_scale=1.0,
            )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - before).abs().max() > 1e-2


def by_hand(alpha: float) -> StoredAdapter:
    """One linear, rank 1: B A = [[3, 6], [-1, -2]]."""
    pair = LowRank(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]]), scaling=alpha
    )
    return StoredAdapter(Path("adapter"), LoraScales(1, alpha), {"proj_out": pair})


def test_merging_by_hand() -> None:
    base = {"proj_out.weight": torch.eye(2), "proj_out.bias": torch.ones(2)}
    merged = adapter_file.merge(base, by_hand(0.5))
    assert merged.state["proj_out.weight"].tolist() == [
        [2.5, 3.0],
        [-0.5, 0.0],
    ]  # I + 0.5 B A
    assert merged.state["proj_out.bias"] is base["proj_out.bias"]
    assert torch.equal(base["proj_out.weight"], torch.eye(2))
    assert merged.lost == 0.0


def test_merge_into_bfloat16_computes_in_float32() -> None:
    base = {"proj_out.weight": torch.full((2, 2), 1.0, dtype=torch.bfloat16)}
    fine = adapter_file.merge(
        base, by_hand(2.0**-12)
    )  # from 1.0 a step up is 2^-7, down 2^-8: all rounds back
    assert torch.equal(fine.state["proj_out.weight"], base["proj_out.weight"])
    assert fine.lost == pytest.approx(1.0)
    coarse = adapter_file.merge(base, by_hand(2.0**-7))
    assert coarse.state["proj_out.weight"].dtype == torch.bfloat16
    assert coarse.state["proj_out.weight"].tolist() == [
        [1 + 3 * 2**-7, 1 + 6 * 2**-7],
        [1 - 2**-7, 1 - 2**-6],
    ]
    assert coarse.lost == 0.0
    assert adapter_file.merge(base, by_hand(0.0)).lost == 0.0  # nothing to rejected


@pytest.mark.slow
def test_adapter_names_at_full_size_load_in_diffusers(tmp_path: Path) -> None:
    """The stock loader reads both layouts for Wan 2.1 1.3B on the meta device."""
    pipeline = large_pipeline()
    module = adapter.attach(pipeline.transformer, LoraConfig(rank=2, alpha=6.0), seed=0)
    draw = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(p.shape, generator=draw)
        for n, p in module.named_parameters()
        if p.requires_grad
    }
    adapter.save(module, tmp_path, state)
    width, wide, rank = 12 * 128, 8960, 2

    def of(name: str, into: int, out: int) -> dict[str, tuple[int, int]]:
        return {
            f"{name}.lora_A.weight": (rank, into),
            f"{name}.lora_B.weight": (out, rank),
        }

    ours: dict[str, tuple[int, ...]] = {}
    theirs: dict[str, tuple[int, ...]] = {}
    for i in range(30):
        for attention, original in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for linear, letter in (
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "o"),
            ):
                ours |= of(f"transformer.blocks.{i}.{attention}.{linear}", width, width)
                theirs |= of(
                    f"diffusion_model.blocks.{i}.{original}.{letter}", width, width
                )
        ours |= of(f"transformer.blocks.{i}.ffn.net.0.proj", width, wide)
        ours |= of(f"transformer.blocks.{i}.ffn.net.2", wide, width)
        theirs |= of(f"diffusion_model.blocks.{i}.ffn.0", width, wide)
        theirs |= of(f"diffusion_model.blocks.{i}.ffn.2", wide, width)
    own = adapter_file.read(tmp_path)
    adapter_file.require_fit(own, weights.shapes_of(WAN_1_3B))
    tensors = write_comfyui(own, tmp_path)
    alphas = {name: t for name, t in tensors.items() if name.endswith(".alpha")}
    assert {n: tuple(t.shape) for n, t in tensors.items() if n not in alphas} == theirs
    assert len(alphas) == 300
    assert {float(alpha) for alpha in alphas.values()} == {6.0}
    for name in (ADAPTER_FILE, COMFYUI):
        fresh = large_pipeline()
        with remarks() as said:
            fresh.load_lora_weights(tmp_path, weight_name=name)
        assert said == []
        assert {n: tuple(t.shape) for n, t in adapter_of(fresh).items()} == ours
    assert len(ours) == 600


def rewritten(
    folder: Path,
    target: Path,
    *,
    settings: dict[str, object] | None = None,
    **tensors: object,
) -> Path:
    """Return a saved adapter with other settings (None: without) or tensors (None: removed)."""
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        names = file.keys()
        found = {name: file.get_tensor(name) for name in names}
        before = json.loads(file.metadata()["lora_adapter_metadata"])
    for name, value in tensors.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    text = (
        {}
        if settings is None
        else {"lora_adapter_metadata": json.dumps({**before, **settings})}
    )
    target.mkdir(exist_ok=True)
    save_file(found, target / ADAPTER_FILE, metadata={"format": "pt", **text})
    return target


FIRST = "transformer.blocks.0.attn1.to_q.lora_A.weight"


def velocities(generator: WanGenerator, pipeline: WanPipeline) -> list[torch.Tensor]:
    """The velocity at a fixed latent: our transformer's, and the stock pipeline's."""
    draw = torch.Generator().manual_seed(4)
    x, sigma = torch.randn(1, *generator.latent_shape, generator=draw), 0.6
    texts = generator.prompts.get(
        ["rain"], device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        ours = generator.velocity(
            x, torch.tensor([sigma]), ["rain"], guidance_scale=1.0
        )
        theirs = pipeline.transformer(x, torch.tensor([1000 * sigma]), texts).sample
    return [ours, theirs]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 2.0}},
        {"alpha_pattern": {"blocks.1.attn2.to_k": 64, "net.2": 1.0}},
        {"alpha_pattern": {"^blocks.0.attn1.to_q": 32, "attn1.to_q": 1}},
        {"use_rslora": True, "alpha_pattern": {"to_v": 0.5}},
    ],
)
def test_scaling_in_metadata_means_what_it_means_to_diffusers(
    folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Sampling, merging and ComfyUI's layout scale each layer as the stock loader does."""
    tiny_generator(folder).save_trained(tmp_path)
    before = {f"transformer.{key}": value for key, value in settings.items()}
    other = rewritten(tmp_path, tmp_path / "other", settings=before)
    pipeline = tiny_pipeline(folder)
    pipeline.load_lora_weights(other)

    # Loaded under a generator whose config knows nothing of it.
    generator = WanGenerator.load(tiny_config(folder), device="cpu")
    generator.load_trained(other)
    ours, theirs = velocities(generator, pipeline)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    generator.load_trained(tmp_path)
    plain, _ = velocities(generator, pipeline)
    assert (plain - theirs).abs().max() > 1e-3

    # Saved again, it is a plain LoRA of the same change.
    generator.load_trained(other)
    generator.save_trained(tmp_path / "again")
    own = adapter_file.read(other)
    again = adapter_file.read(tmp_path / "again")
    added = as_comfyui_adds(adapter_file.comfyui(own))
    assert not again.scales.alpha_pattern
    assert not again.scales.use_rslora
    for linear, pair in own.pairs.items():
        changed = pair.change()
        torch.testing.assert_close(again.pairs[linear].change(), changed)

    # ComfyUI's layout has the names of Wan's own code.
    renamed = convert_wan_transformer_to_diffusers(added)
    merged = adapter_file.merge(weights.read(folder).state, own).state
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for linear, pair in own.pairs.items():
        name = f"{linear}.weight"
        torch.testing.assert_close(renamed[name].float(), pair.change())
        fused = pipeline.transformer.get_submodule(linear).weight
        torch.testing.assert_close(merged[name], fused, atol=1e-5, rtol=1e-5)


def test_rank_of_single_layers_is_read_and_does_not_fit_another(
    folder: Path, tmp_path: Path
) -> None:
    """alpha 8 over the layer's rank 2 is 4, over the others' rank 4 it is 2."""
    tiny_generator(folder).save_trained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    halves = {}
    for side in "AB":
        name = f"transformer.blocks.0.attn1.to_q.lora_{side}.weight"
        half = tensors[name][:2] if side == "A" else tensors[name][:, :2]
        halves[name] = half.clone()
    pattern = {"transformer.rank_pattern": {"blocks.0.attn1.to_q": 2}}
    other = rewritten(tmp_path, tmp_path / "other", settings=pattern, **halves)
    own = adapter_file.read(other)
    assert own.pairs["blocks.0.attn1.to_q"].scaling == 4.0
    assert own.pairs["blocks.0.attn1.to_k"].scaling == 2.0
    pipeline = tiny_pipeline(folder)
    pipeline.load_lora_weights(other)
    pipeline.fuse_lora()
    merged = adapter_file.merge(weights.read(folder).state, own).state
    pipeline.unload_lora_weights()
    fused = pipeline.transformer.blocks[0].attn1.to_q.weight
    torch.testing.assert_close(merged["blocks.0.attn1.to_q.weight"], fused)
    with pytest.raises(ValueError, match=r"attn1\.to_q\.lora_A\.weight is \(2, 24\)"):
        WanGenerator.load(tiny_config(folder), device="cpu").load_trained(other)


@pytest.fixture(scope="module")
def fresh(folder: Path) -> WanGenerator:
    return WanGenerator.load(tiny_config(folder), device="cpu")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of `tiny_generator`: rank 4, alpha 8."""
    target = tmp_path_factory.mktemp("saved")
    tiny_generator(folder).save_trained(target)
    return target


def both_read(generator: WanGenerator, adapter_folder: Path, words: str) -> None:
    """Export's reader and a generator refuse the file, with its name."""
    for read in (adapter_file.read, generator.load_trained):
        with pytest.raises(ValueError, match=words) as caught:
            read(adapter_folder)
        assert str(adapter_folder / ADAPTER_FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no rank and alpha"),
        ("{}", "no rank and alpha"),
        ("[1]", "not a JSON object"),
        ("{'r': 4}", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"transformer.r": 4}', "no rank and alpha"),
        ('{"transformer.r": "4", "transformer.lora_alpha": 8}', "no rank and alpha"),
        ('{"transformer.r": 0, "transformer.lora_alpha": 8}', "no rank and alpha"),
        ('{"transformer.r": true, "transformer.lora_alpha": 8}', "no rank and alpha"),
        ('{"transformer.r": 4, "transformer.lora_alpha": NaN}', "no rank and alpha"),
        ('{"r": 4, "lora_alpha": 8}', "no rank and alpha"),
    ],
)
def test_metadata_without_a_scaling_is_refused_everywhere(
    fresh: WanGenerator, saved: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    """The config's alpha does not stand in for the file's."""
    tensors = load_file(saved / ADAPTER_FILE)
    metadata = {} if text is None else {"lora_adapter_metadata": text}
    save_file(tensors, tmp_path / ADAPTER_FILE, metadata={"format": "pt", **metadata})
    both_read(fresh, tmp_path, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"attn1.to_q": "4"}}, "alpha_pattern"),
        ({"alpha_pattern": [4]}, "alpha_pattern"),
        ({"rank_pattern": {"attn1.to_q": 1.5}}, "rank_pattern"),
        ({"rank_pattern": {"attn1.to_q": 3}}, "r=3"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ],
)
def test_settings_that_are_not_supported_are_refused_everywhere(
    fresh: WanGenerator,
    saved: Path,
    tmp_path: Path,
    settings: dict[str, object],
    words: str,
) -> None:
    named = {f"transformer.{key}": value for key, value in settings.items()}
    both_read(fresh, rewritten(saved, tmp_path / "other", settings=named), words)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_adapter_file_that_is_cut_is_refused_everywhere(
    fresh: WanGenerator, saved: Path, tmp_path: Path, size: int
) -> None:
    content = (saved / ADAPTER_FILE).read_bytes()
    (tmp_path / ADAPTER_FILE).write_bytes(content[:size])
    both_read(fresh, tmp_path, "whole safetensors file")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_adapter_with_nan_is_refused_everywhere(
    fresh: WanGenerator, saved: Path, tmp_path: Path, value: float, place: int
) -> None:
    tensors = load_file(saved / ADAPTER_FILE)
    name = sorted(tensors)[place]
    tensors[name].view(-1)[place] = value
    both_read(fresh, rewritten(saved, tmp_path / "other", settings={}, **tensors), name)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        (None, {}, "rank"),
        ({"transformer.r": 5}, {}, "r=5"),
        ({"transformer.use_dora": True}, {}, "use_dora"),
        ({"transformer.layers_to_transform": [0]}, {}, "layers_to_transform"),
        ({"transformer.exclude_modules": ["attn2"]}, {}, "exclude_modules"),
        ({"transformer.init_lora_weights": "pissa"}, {}, "pissa"),
        ({"transformer.use_rslora": "false"}, {}, "use_rslora"),
        ({}, {FIRST: torch.zeros(4, 24, dtype=torch.int64)}, "int64"),
        ({}, {FIRST: None}, r"\(24, 4\)"),
        (
            {},
            {"transformer.blocks.0.attn1.to_q.diff": torch.zeros(2, 2)},
            r"to_q\.diff",
        ),
        (
            {},
            {"text_encoder.q.lora_A.weight": torch.zeros(4, 2)},
            r"text_encoder\.q\.lora_A",
        ),
    ],
)
def test_read_of_misfitting_adapter_raises(
    folder: Path, tmp_path: Path, settings: dict | None, tensors: dict, words: str
) -> None:
    tiny_generator(folder).save_trained(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        adapter_file.read(
            rewritten(tmp_path, tmp_path / "other", settings=settings, **tensors)
        )
    assert ADAPTER_FILE in str(caught.value)


def test_merge_of_another_models_adapter_raises(folder: Path, tmp_path: Path) -> None:
    own = stored(tiny_generator(folder), tmp_path)
    base = weights.read(folder).state
    pairs = {**own.pairs, "blocks.7.attn1.to_q": own.pairs["blocks.0.attn1.to_q"]}
    pairs["proj_out"] = LowRank(torch.zeros(4, 9), torch.zeros(64, 4), scaling=1.0)
    with pytest.raises(ValueError, match=r"\(64, 24\)"):
        adapter_file.merge(base, replace(own, pairs=pairs))
    with pytest.raises(ValueError, match="add_k_proj"):
        adapter_file.original_name("blocks.0.attn1.add_k_proj")


def test_merge_that_overflows_names_the_layer(folder: Path, tmp_path: Path) -> None:
    """1e20 x 1e20 is finite in no format of weights."""
    own = stored(tiny_generator(folder), tmp_path)
    base = weights.read(folder).state
    name = "blocks.0.attn1.to_q"
    pair = own.pairs[name]
    huge = LowRank(
        torch.full_like(pair.a_RI, 1e20), torch.full_like(pair.b_OR, 1e20), 1.0
    )
    with pytest.raises(ValueError, match=rf"{name}\.weight"):
        adapter_file.merge(base, replace(own, pairs={name: huge}))


def test_folder_of_both_a_transformer_and_an_adapter_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    """Which of them was meant is unknown; before, the adapter was silently left out."""
    generator = tiny_generator(folder)
    generator.save_trained(tmp_path)
    shutil.copytree(folder / "transformer", tmp_path / "transformer")
    with pytest.raises(ValueError, match=ADAPTER_FILE):
        tiny_generator(folder).load_trained(tmp_path)
