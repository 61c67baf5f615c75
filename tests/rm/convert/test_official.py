"""A converted official checkpoint gives the official rewards; wrong input is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rm.convert.official import (
    REWARD,
    convert_checkpoint,
    read_template,
    read_tokenizer,
)
from rm.model import DeScore
from rm.prompt import CONTROL_TOKENS, PromptTemplate
from rm.video import prepare
from tests import official_checkpoint
from tests.official_checkpoint import WRAPPED, Trained
from tests.tiny_qwen import (
    PLAIN_ADDED,
    SETTINGS,
    TEMPLATE,
    random_frames,
    tiny_tokenizer,
)

WEIGHTS, ADAPTER = "model.safetensors", "lora_adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained() -> Trained:
    return official_checkpoint.train()


@pytest.fixture
def folder(tmp_path: Path, trained: Trained) -> Path:
    return official_checkpoint.write(tmp_path / "checkpoint-7", trained)


@pytest.fixture(scope="module")
def videos():
    return [
        prepare(random_frames(i, frames=4 + 2 * i), SETTINGS, fps=4.0) for i in range(3)
    ]


def read(folder: Path, *, dtype: str = "float32", **options):
    options = {"allow_pickle": True, **options}
    return convert_checkpoint(
        folder, template=TEMPLATE, settings=SETTINGS, dtype=dtype, **options
    )


def batch_of(model: DeScore, videos):
    texts = zip(
        ["a", "a red ball moves", "x" * 30],
        videos,
        ["thought", None, "a longer chain"],
        strict=True,
    )
    return model.batch([model.encode(*text) for text in texts], videos)


@torch.no_grad()
def check(model: DeScore, trained: Trained, videos) -> None:
    batch = batch_of(model, videos)
    want = trained.reward(batch)
    torch.testing.assert_close(
        model(batch).squeeze(1).double(), want, atol=1e-5, rtol=0
    )
    assert want.std() > 0.1  # or the comparison would be empty


def edit(file: Path, change) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def resave(file: Path, change) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


# ---------------------------------------------------------------------- the reward


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", [{}, {"sharded": True}, {"wrapped_names": True}], ids=str
)
def test_converted_reward_equals_the_official_reward(tmp_path, videos, tied, layout):
    trained = official_checkpoint.train(tied=tied)
    folder = official_checkpoint.write(tmp_path / "checkpoint-7", trained, **layout)
    assert len(list(folder.glob("model-*.safetensors"))) == 0 or "sharded" in layout
    conversion = read(folder)
    assert (conversion.merged, conversion.head_from) == (
        14,
        folder / "rm_head.pth",
    )  # 2 layers x 7 linears
    check(conversion.model, trained, videos)
    conversion.model.save(tmp_path / "descore")
    loaded = DeScore.load(tmp_path / "descore")
    check(loaded, trained, videos)
    assert (loaded.template, loaded.settings) == (TEMPLATE, SETTINGS)


@torch.no_grad()
def test_reward_depends_on_lora_alpha_and_query(folder, trained, videos):
    """The comparison above would see a missing LoRA, another alpha and another query."""
    model = read(folder).model
    batch = batch_of(model, videos)
    want = trained.reward(batch)
    with trained.model.disable_adapter():
        assert (trained.reward(batch) - want).abs().max() > 0.1
    assert (
        read(folder, alpha=64.0).model(batch).squeeze(1).double() - want
    ).abs().max() > 0.1
    model.query.copy_(
        model.backbone.get_input_embeddings().weight[trained.reward_id - 1]
    )
    assert (model(batch).squeeze(1).double() - want).abs().max() > 0.1


def test_merge_by_hand_with_default_and_given_alpha(folder, trained):
    """W + (alpha / r) B A of one linear, with the alpha that was asked for: 128 / 4, then 8 / 4."""
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = trained.model.base_model.model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for alpha, scaling in ((None, 32), (8.0, 2)):
        merged = read(folder, alpha=alpha).model.backbone.get_submodule(name).weight
        torch.testing.assert_close(
            merged, layer.base_layer.weight + scaling * b @ a, atol=1e-6, rtol=0
        )


def test_lora_option_must_fit_the_folder(folder, trained, videos):
    with pytest.raises(ValueError, match="--no-lora"):
        read(folder, lora=False)
    for file in (folder / "lora_adapter").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="--no-lora"):
        read(folder)
    (folder / "lora_adapter").rmdir()
    with pytest.raises(FileNotFoundError, match="--no-lora"):
        read(folder)
    with trained.model.disable_adapter():
        check(read(folder, lora=False).model, trained, videos)


def test_bfloat16_is_the_backbone_only(folder, trained):
    assert read(folder).lost == 0.0
    conversion = read(folder, dtype="bfloat16")
    # an adapter much larger than a step of bfloat16, 2^-8 of the weight
    assert 1e-4 < conversion.lost < 0.05
    model = conversion.model
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    row = trained.model.get_input_embeddings().weight[264:265]
    assert torch.equal(model.query, row)
    assert torch.equal(model.head.weight, trained.head_1D)
    assert model.query.dtype == model.head.weight.dtype == torch.float32


# ---------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"rm_head.weight": w},
        lambda w: {f"{WRAPPED}rm_head.weight": w},
        lambda w: {"weight": w},
        lambda w: {"model": {"rm_head.weight": w}},  # stage 2
        lambda w: {"model": {"_fsdp_wrapped_module.rm_head.weight": w.bfloat16()}},
    ],
)
def test_head_is_read_under_each_of_its_names(folder, trained, wrap):
    torch.save(wrap(trained.head_1D), folder / "rm_head.pth")
    weight = read(folder).model.head.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.detach(), trained.head_1D, atol=0, rtol=2**-8)


def test_safetensors_head_needs_no_allow_pickle(tmp_path, folder, trained, videos):
    with pytest.raises(ValueError, match="--allow-pickle"):
        read(folder, allow_pickle=False)
    named = tmp_path / "other.safetensors"
    save_file({"rm_head.weight": 2 * trained.head_1D}, named)
    torch.testing.assert_close(
        read(folder, head=named, allow_pickle=False).model.head.weight,
        2 * trained.head_1D,
    )
    save_file({"weight": trained.head_1D}, folder / "rm_head.safetensors")
    found = read(folder, allow_pickle=False)
    assert found.head_from == folder / "rm_head.safetensors"
    check(found.model, trained, videos)


def test_head_among_the_weights_is_used(folder, trained, videos):
    resave(folder / WEIGHTS, lambda state: {**state, "rm_head.weight": trained.head_1D})
    found = read(folder, allow_pickle=False)  # the .pth is there and is not touched
    assert found.head_from == folder / WEIGHTS
    check(found.model, trained, videos)


class Foreign:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickle_runs_no_code(tmp_path, folder, trained, allow_pickle):
    torch.save(
        {"rm_head.weight": trained.head_1D, "x": Foreign(tmp_path / "ran")},
        folder / "rm_head.pth",
    )
    with pytest.raises(ValueError, match="mkdir" if allow_pickle else "--allow-pickle"):
        read(folder, allow_pickle=allow_pickle)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "rm_head.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"rm_head.weight": torch.zeros(1, 16)},
            r"\(1, 16\)",
        ),
        (
            {"rm_head.weight": torch.zeros(3, 32)},
            r"\(3, 32\)",
        ),  # several query tokens
        ({"rm_head.weight": torch.zeros(32)}, r"\(32,\)"),
        (
            {"rm_head.weight": torch.zeros(1, 32), "rm_head.bias": torch.zeros(1)},
            "rm_head.bias",
        ),
        (
            {"v_head.weight": torch.zeros(1, 32)},
            "v_head",
        ),
        ({}, r"\[\]"),
        ({"model": torch.zeros(1, 32)}, "Tensor"),
    ],
)
def test_wrong_head_is_refused(folder, content, message):
    torch.save(content, folder / "rm_head.pth")
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_missing_head_is_an_error(tmp_path, folder):
    (folder / "rm_head.pth").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="--head",
    ):
        read(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read(folder, head=tmp_path / "nowhere.pth")
    (folder / "rm_head.pth").write_bytes(b"nothing that torch wrote")
    with pytest.raises(ValueError, match=r"rm_head\.pth"):
        read(folder)


# ---------------------------------------------------------------------- the tokenizer and the query


def test_query_token_is_removed_from_the_tokenizer(tmp_path, folder, trained):
    model = read(folder).model
    assert model.query_id == trained.reward_id == 264
    assert torch.equal(
        model.query.detach(), trained.model.get_input_embeddings().weight[264:265]
    )
    model.save(tmp_path / "descore")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "descore")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert [
        t for t in CONTROL_TOKENS if tokenizer.convert_tokens_to_ids(t) is None
    ] == []
    for file in (tmp_path / "descore").glob("*.json"):
        assert REWARD not in file.read_text(encoding="utf-8")
    text = f"say {REWARD} <|im_end|>{PLAIN_ADDED}\n"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert model.query_id not in tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(folder).encode(REWARD) == [264]  # it had one


def test_padded_rows_are_means_and_banned(folder, trained):
    model = read(folder).model
    rows = model.backbone.get_input_embeddings().weight
    assert (
        len(rows)
        == model.backbone.lm_head.weight.shape[0]
        == model.backbone.config.text_config.vocab_size
        == 320
    )
    before = trained.model.get_input_embeddings().weight
    assert torch.equal(rows[:265], before)
    torch.testing.assert_close(rows[265:], before.mean(0).expand(55, -1))
    assert model.banned_ids()[264:].all()


def test_tokenizer_without_reward_token_is_refused(folder):
    tiny_tokenizer().save_pretrained(folder)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=REWARD):
        read(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        read(folder)


def test_reward_token_before_other_tokens_is_refused(folder):
    """Without it, later tokens would move up by one."""
    tokenizer = official_checkpoint.tokenizer_with_reward()
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=REWARD):
        read_tokenizer(folder)


# ---------------------------------------------------------------------- weights and config


def test_missing_weights_are_named(tmp_path, trained):
    folder = official_checkpoint.write(tmp_path / "checkpoint-8", trained, sharded=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shards[1].name):
        read(folder)
    shards[1].unlink()
    with pytest.raises(
        FileNotFoundError,
        match=shards[1].name,
    ):
        read(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-8"):
        read(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read(folder)
    (folder / "actor").mkdir()
    (folder / "actor/model_world_size_8_rank_0.pt").touch()
    with pytest.raises(ValueError, match=r"rank_0\.pt"):
        read(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_misfitting_weights_are_named(folder):
    whole, norm = load_file(folder / WEIGHTS), "model.language_model.norm.weight"
    for state, message in (
        ({k: v for k, v in whole.items() if k != norm}, norm),
        ({**whole, "extra": torch.zeros(2)}, "extra"),
        (
            {**whole, norm: torch.zeros(31)},
            r"\(31,\)",
        ),
        ({**whole, f"{WRAPPED}{norm}": whole[norm].clone()}, norm),
        (
            {**whole, "model.x.lora_A.default.weight": torch.zeros(2)},
            "lora_adapter/",
        ),
        (
            {"model.norm.weight": whole[norm]},
            "model.language_model.embed_tokens.weight",
        ),
    ):
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_missing_reward_row_is_refused(folder):
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    resave(
        folder / WEIGHTS,
        lambda state: {
            k: v[:264].clone() if k in names else v for k, v in state.items()
        },
    )
    with pytest.raises(
        ValueError,
        match="264",
    ):
        read(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 8, "r=8"),
        ("r", None, "r=None"),
        ("lora_alpha", None, "lora_alpha=None"),
        ("use_rslora", True, "use_rslora"),
        ("modules_to_save", ["rm_head"], "modules_to_save"),
        ("alpha_pattern", {"q_proj": 3}, "alpha_pattern"),
    ],
)
def test_unsupported_lora_is_refused(folder, key, value, message):
    edit(
        folder / "lora_adapter/adapter_config.json",
        lambda raw: raw.update({key: value}),
    )
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_misfitting_lora_tensors_are_named(folder):
    whole = load_file(folder / ADAPTER)
    with safe_open(folder / ADAPTER, framework="pt") as tensors:
        first = sorted(tensors.keys())[0]
    assert first.startswith(WRAPPED)
    for state, message in (
        (
            {k: v for k, v in whole.items() if k != first},
            r"layers\.0",
        ),
        (
            {k.replace("layers.1", "layers.9"): v for k, v in whole.items()},
            r"layers\.9",
        ),
        (
            {**whole, first: torch.zeros(4, 31)},
            "31",
        ),
        (
            {**whole, "x.lora_embedding_A": torch.zeros(2)},
            "lora_embedding_A",
        ),
        ({}, "adapter_model"),
    ):
        save_file(state, folder / ADAPTER)
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_config_is_read_from_the_base(tmp_path, folder, trained, videos):
    base = tmp_path / "base"
    base.mkdir()
    (folder / "config.json").rename(base / "config.json")
    with pytest.raises(FileNotFoundError, match="--base"):
        read(folder)
    edit(
        base / "config.json", lambda raw: raw["text_config"].update(vocab_size=320)
    )  # as before `<Reward>` came
    check(read(folder, base=base).model, trained, videos)
    (base / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert"):
        read(folder, base=base)


def test_default_video_settings_are_official(folder):
    settings = convert_checkpoint(
        folder, allow_pickle=True, template=TEMPLATE
    ).model.settings
    assert (
        settings.fps,
        settings.min_pixels,
        settings.max_pixels,
        settings.budget,
    ) == (2.0, 3_136, 200_704, "frame")
    assert (settings.patch_size, settings.merge_size, settings.temporal_patch_size) == (
        8,
        2,
        2,
    )  # this tower's


# ---------------------------------------------------------------------- the prompt


def test_read_template_of_an_official_text(tmp_path):
    file = tmp_path / "instruction.txt"
    file.write_text(
        '\nText: [insert prompt here]\nVideo: <video>\nAnswer {"x": 1} \n',
        encoding="utf-8",
    )
    template = read_template(file)
    assert template == PromptTemplate(
        "\nText: {prompt}\nVideo: ", '\nAnswer {"x": 1} \n'
    )
    assert template.fill("a cat") == "\nText: a cat\nVideo: "
    template.save(tmp_path / "prompt.json")
    assert read_template(tmp_path / "prompt.json") == template


@pytest.mark.parametrize(
    "text",
    [
        "Text: [insert prompt here]",
        "Video: <video>",
        "<video> [insert prompt here]",
        "[insert prompt here] <video> <video>",
        "[insert prompt here] [insert prompt here] <video>",
        "[insert prompt here] {prompt} <video>",
    ],
)
def test_template_without_its_slots_is_refused(tmp_path, text):
    (tmp_path / "instruction.txt").write_text(text)
    with pytest.raises(ValueError, match=r"instruction\.txt"):
        read_template(tmp_path / "instruction.txt")
