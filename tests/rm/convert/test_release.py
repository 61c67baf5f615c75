"""A released DeScore is a stock Qwen3-VL with query and head, and gives equal rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from common.lora import adapters_off
from rm.config import BackboneLora, Generation, LearningRates, RewardDimension
from rm.convert import release
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from rm.video import prepare
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

PROMPTS = ["a red ball", "two cats", "rain"]
# sampled, by seeds that depend on the input: a random model's greedy CoT does not end
WRITING = Generation(max_new_tokens=80, temperature=2.0, repetition_penalty=1.0)
TWO = {"VQ": RewardDimension(weight=1.0), "TA": RewardDimension(weight=0.5)}


def trained(dimensions: dict[str, RewardDimension] | None = None) -> DeScore:
    """With a LoRA of rank 3 and alpha 7 that changes much, and a query and head of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = DeScore(
            tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, WRITING, dimensions
        )
        model.param_groups(
            LearningRates(),
            lora=BackboneLora(rank=3, alpha=7.0, dropout=0.0),
            weight_decay=0.0,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, 0.3)
            model.query.normal_()
            model.head.weight.normal_()
    return model.eval()


def videos() -> list[torch.Tensor]:
    return [random_frames(i) for i in range(len(PROMPTS))]


@pytest.fixture(params=[None, TWO], ids=["one reward", "two rewards"])
def descore(request: pytest.FixtureRequest) -> DeScore:
    return trained(request.param)


@pytest.fixture
def released(descore: DeScore, tmp_path: Path) -> Path:
    descore.save(tmp_path / "final")
    release.copy_release(release.inspect(tmp_path / "final"), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("cots", [0, 1])
def test_released_rewards_equal_those_with_unmerged_lora(
    descore: DeScore, released: Path, cots: int
) -> None:
    loaded = DeScoreScorer.load(released, device="cpu", cots=cots)
    own = DeScoreScorer(descore, cots=cots)
    if cots:
        speak_plainly(loaded.model.backbone)
        speak_plainly(own.model.backbone)
    found, want = (scorer.score(videos(), PROMPTS, fps=4.0) for scorer in (loaded, own))
    torch.testing.assert_close(found.value_B, want.value_B, atol=1e-5, rtol=0)
    assert found.texts == want.texts
    assert want.value_B.std() > 1e-2
    if cots == 0:
        with adapters_off(descore):
            assert (
                own.score(videos(), PROMPTS, fps=4.0).value_B - want.value_B
            ).abs().max() > 1e-2


def test_stock_class_loads_all_weights(released: Path) -> None:
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        released, output_loading_info=True
    )
    assert not any(info.values()), info
    stored = load_file(released / "model.safetensors")
    assert all(
        torch.equal(weight, stored[name])
        for name, weight in model.state_dict().items()
        if name in stored
    )


@torch.no_grad()
def test_stock_model_with_query_and_head_gives_the_reward(
    descore: DeScore, released: Path
) -> None:
    """Without our classes: set the query's rows, take last hidden states, multiply."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(released).eval()
    own, ready = (
        load_file(released / "descore.safetensors"),
        [prepare(v, SETTINGS, fps=4.0) for v in videos()],
    )
    rows = len(descore.dimensions)
    model.get_input_embeddings().weight[264 : 264 + rows] = own["query"]
    batch = descore.batch(
        [descore.encode(p, v) for p, v in zip(PROMPTS, ready, strict=True)], ready
    )
    hidden_BLD = model.model(
        input_ids=batch.ids_BL,
        attention_mask=batch.mask_BL,
        pixel_values_videos=batch.patches,
        video_grid_thw=batch.grid_B3,
        mm_token_type_ids=(batch.ids_BL == descore.video_pad_id).int() * 2,
    ).last_hidden_state
    for b, last in enumerate(batch.last_B.tolist()):
        hidden_KD = hidden_BLD[b, last + 1 - rows : last + 1]
        want_K = descore(batch)[b]
        torch.testing.assert_close(
            (own["head"] * hidden_KD).sum(-1), want_K, atol=1e-5, rtol=1e-5
        )


def test_inspect_reports_the_folder(descore: DeScore, released: Path) -> None:
    found = release.inspect(released)
    assert (found.query_id, found.dtype, found.dimensions) == (
        264,
        "float32",
        tuple(descore.dimensions),
    )
    assert found.video == SETTINGS
    assert found.tensors == len(load_file(released / "model.safetensors"))


def test_copy_has_no_other_file_and_no_local_path(tmp_path: Path) -> None:
    final = tmp_path / "final"
    trained().save(final)
    (final / "notes.txt").write_text("mine")
    (final / "optimizer.safetensors").write_bytes(b"")
    (final / "calibration.json").write_text("{}")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((final / name).read_text())
        config |= {"_name_or_path": str(tmp_path), "name_or_path": str(tmp_path)}
        (final / name).write_text(json.dumps(config))
    release.copy_release(release.inspect(final), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in final.iterdir()} - {
        "notes.txt",
        "optimizer.safetensors",
    }
    assert not any(
        str(tmp_path).encode() in file.read_bytes()
        for file in (tmp_path / "out").iterdir()
    )
    assert DeScoreScorer.load(tmp_path / "out", device="cpu").model.query_id == 264
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        final / "model.safetensors"
    ).read_bytes()


def broken(final: Path, file: str, **tensors: torch.Tensor | None) -> None:
    found = load_file(final / file)
    for name, value in tensors.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    save_file(found, final / file, metadata={"format": "pt"})


NORM = "model.language_model.norm.weight"


def test_misfitting_folder_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "final"
    trained().save(final)
    broken(final, "descore.safetensors", head=torch.zeros(2, 32))
    with pytest.raises(
        ValueError,
        match=r"\(2, 32\)",
    ):
        release.inspect(final)
    for change, words in (
        ({NORM: None}, NORM),
        ({NORM: torch.zeros(31)}, r"\(31,\)"),
        ({"rm_head.weight": torch.zeros(1, 32)}, "rm_head.weight"),
    ):
        trained().save(final)
        broken(final, "model.safetensors", **change)
        with pytest.raises(ValueError, match=words):
            release.inspect(final)
    (final / "prompt.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompt\.json"):
        release.inspect(final)
