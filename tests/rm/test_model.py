"""DeScore on a real, random Qwen3-VL: positions, the query, what is trained, folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from rm.config import BackboneLora, Generation, LearningRates, VideoSettings
from rm.model import (
    DESCORE_FILE,
    HEAD_FILE,
    HEAD_INIT_STD,
    DeScore,
    rope_positions,
)
from rm.prompt import DEFAULT_TEMPLATE, Encoded
from rm.video import prepare
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    save_tiny_qwen,
    tiny_qwen,
    tiny_tokenizer,
)

PROMPTS = ["a", "a red ball moves left", "two cats", "x" * 40]
COTS = ["short", None, "a much longer chain of thought <think>", ""]


def judge(**options) -> DeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DeScore(
            tiny_qwen(**options), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264
        ).eval()


@pytest.fixture(scope="module")
def model():
    return judge()


@pytest.fixture(scope="module")
def videos():
    # 4, 3, 1 and 2 temporal patches; 32 x 32, 16 x 64 and 32 x 32 frames
    frames = [
        random_frames(0, frames=8),
        random_frames(1, frames=5),
        random_frames(2, frames=1),
    ]
    wide = random_frames(3, frames=4).reshape(4, 16, 64, 3)
    return [prepare(x, SETTINGS, fps=4.0) for x in (*frames, wide)]


@pytest.fixture(scope="module")
def encoded(model, videos):
    return [
        model.encode(p, v, c) for p, v, c in zip(PROMPTS, videos, COTS, strict=True)
    ]


def test_positions_are_those_of_the_stock_model(model, videos, encoded):
    batch = model.batch(encoded, videos)
    stock, _ = model.backbone.model.get_rope_index(
        batch.ids_BL,
        mm_token_type_ids=(batch.ids_BL == model.video_pad_id).int() * 2,
        video_grid_thw=batch.grid_B3,
        attention_mask=batch.mask_BL,
    )
    assert torch.equal(stock * batch.mask_BL, batch.position_3BL * batch.mask_BL)


def test_positions_by_hand():
    # text, text, a 1 x 2 patch, text, a 1 x 2 patch, text;
    # the grid in patches before merging is 2 x 2 x 4.
    is_video = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]]).bool()
    found = rope_positions(is_video, torch.tensor([[2, 2, 4]]), 2)[:, 0].tolist()
    assert found == [
        [0, 1, 2, 2, 4, 5, 5, 7],
        [0, 1, 2, 2, 4, 5, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


@torch.no_grad()
def test_reward_by_another_route(model, videos, encoded):
    """Stock model, input embeddings made by hand, stock positions; then a dot product in fp64."""
    batch = model.batch(encoded, videos)
    stock = tiny_qwen()
    embedded = stock.get_input_embeddings()(batch.ids_BL)
    embedded[torch.arange(4), batch.last_B] = model.query
    positions, _ = stock.model.get_rope_index(
        batch.ids_BL,
        mm_token_type_ids=(batch.ids_BL == model.video_pad_id).int() * 2,
        video_grid_thw=batch.grid_B3,
        attention_mask=batch.mask_BL,
    )
    vision = stock.model.get_video_features(batch.patches, batch.grid_B3)
    hidden = stock.model(
        input_ids=None,
        inputs_embeds=embedded,
        position_ids=positions,
        attention_mask=batch.mask_BL,
        mm_encoder_outputs={"video": vision},
    ).last_hidden_state
    want = (
        hidden[torch.arange(4), batch.last_B].double() * model.head.weight.double()
    ).sum(-1)
    torch.testing.assert_close(
        model(batch).squeeze(1).double(), want, atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_padding_and_batch_change_no_reward(model, videos, encoded):
    together = model(model.batch(encoded, videos))
    alone = torch.cat(
        [model(model.batch([e], [v])) for e, v in zip(encoded, videos, strict=True)]
    )
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    order = [2, 0, 3, 1]
    permuted = model(
        model.batch([encoded[i] for i in order], [videos[i] for i in order])
    )
    torch.testing.assert_close(permuted, together[order], atol=1e-6, rtol=0)
    assert together.std() > 1e-3  # or the comparison would be empty


@torch.no_grad()
def test_masked_hidden_states_are_those_without_a_chain(model, videos):
    full = model.encode("a cat", videos[0], "thoughts")
    masked, never = Encoded(full.prompt_ids), model.encode("a cat", videos[0])
    assert torch.equal(
        model.hidden(model.batch([masked], videos[:1])),
        model.hidden(model.batch([never], videos[:1])),
    )
    assert not torch.equal(
        model(model.batch([full], videos[:1])), model(model.batch([masked], videos[:1]))
    )


@torch.no_grad()
def test_the_query_is_read_and_its_vocabulary_row_is_not(videos):
    model = judge()
    batch = model.batch([model.encode("a", videos[0])], videos[:1])
    before = model(batch)
    model.backbone.get_input_embeddings().weight[model.query_id] += 100.0
    assert torch.equal(model(batch), before)
    model.query += 1.0
    assert not torch.equal(model(batch), before)


def test_the_query_starts_at_the_mean_of_the_vocabulary(model):
    rows = model.backbone.get_input_embeddings().weight[:264].detach()
    torch.testing.assert_close(
        model.query.detach(), rows.mean(0, keepdim=True), atol=1e-6, rtol=0
    )
    assert model.head.weight.std().item() == pytest.approx(
        HEAD_INIT_STD, rel=0.4
    )  # 32 draws
    assert model.head.bias is None


def test_the_reward_needs_no_vocabulary_logits(model, videos, encoded):
    handle = model.backbone.lm_head.register_forward_hook(
        lambda *_: pytest.fail("lm_head was computed")
    )
    try:
        model(model.batch(encoded, videos))
    finally:
        handle.remove()


@torch.no_grad()
def test_position_state_of_other_calls_does_not_matter(model, videos, encoded):
    batch = model.batch(encoded, videos)
    before = model(batch)
    model.backbone.model.rope_deltas = torch.full((4, 1), 17)
    after = model(batch)
    model.backbone.model.rope_deltas = None
    assert torch.equal(before, after)


def groups_of(model: DeScore, **rates) -> dict[str, dict]:
    lora = rates.pop("lora", None)
    groups = model.param_groups(LearningRates(**rates), lora=lora, weight_decay=0.01)
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("lora", [None, BackboneLora(rank=2, alpha=4.0, dropout=0.0)])
def test_gradient_reaches_every_part_but_the_vocabulary(videos, lora):
    model = judge(tied=False)
    groups = groups_of(model, llm=1e-3, head=1e-2, lora=lora)
    batch = model.batch([model.encode("a", videos[0], "thought")], videos[:1])
    model(batch).sum().backward()
    assert set(groups) == {"llm", "vision", "merger", "query", "head"}
    for group in groups.values():
        assert any(
            p.grad is not None and p.grad.abs().sum() > 0 for p in group["params"]
        )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {
        "backbone.lm_head.weight",
        "backbone.model.language_model.embed_tokens.weight",
    } <= frozen
    # 2 layers x 7 linears x (A, B), or 2 layers x (7 linears + 4 norms) and the final norm
    assert len(groups["llm"]["params"]) == (28 if lora else 23)
    assert (groups["llm"]["lr"], groups["head"]["lr"], groups["vision"]["lr"]) == (
        1e-3,
        1e-2,
        2e-6,
    )
    assert (groups["query"]["weight_decay"], groups["head"]["weight_decay"]) == (
        0.0,
        0.01,
    )
    everything = [p for group in groups.values() for p in group["params"]]
    assert len({id(p) for p in everything}) == len(everything)
    assert {id(p) for p in everything} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_learning_rate_0_freezes_the_part():
    model = judge()
    assert set(groups_of(model, vision=0.0, merger=0.0)) == {"llm", "query", "head"}
    assert not any(p.requires_grad for p in model.backbone.model.visual.parameters())


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_saved_folder_round_trips(tmp_path, videos, encoded, tied, with_lora):
    model = judge(tied=tied)
    if with_lora:
        groups = groups_of(model, lora=BackboneLora(rank=2, alpha=6.0, dropout=0.5))
        for parameter in groups["llm"]["params"]:
            parameter.normal_(std=0.2)
    model.generation = Generation(max_new_tokens=7, repetition_penalty=1.0)
    model.eval()
    batch = model.batch(encoded, videos)
    before = model(batch)
    model.save(tmp_path / "judge")
    loaded = DeScore.load(tmp_path / "judge")
    torch.testing.assert_close(loaded(batch), before, atol=1e-6, rtol=0)
    assert (loaded.template, loaded.settings, loaded.generation) == (
        TEMPLATE,
        SETTINGS,
        model.generation,
    )
    assert loaded.encode(PROMPTS[0], videos[0], COTS[0]) == encoded[0]
    assert not loaded.training
    # and it is a stock Qwen3-VL, with the adapters inside
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "judge")
    assert not any("lora" in name for name in stock.state_dict())
    ids = batch.ids_BL[:1, :20]
    torch.testing.assert_close(
        stock(ids).logits, model.backbone(ids).logits, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_given_weights_are_saved_instead_of_the_models(tmp_path, videos, encoded):
    model = judge()
    model.save(tmp_path, {**model.state_dict(), "head.weight": model.head.weight * 2})
    batch = model.batch(encoded, videos)
    torch.testing.assert_close(
        DeScore.load(tmp_path)(batch), 2 * model(batch), atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_half_precision_keeps_query_and_head_in_fp32(tmp_path, videos, encoded):
    judge().save(tmp_path)
    half = DeScore.load(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.lm_head.weight.dtype == torch.bfloat16
    assert half.query.dtype == half.head.weight.dtype == torch.float32
    reward = half(half.batch(encoded, videos))
    assert reward.dtype == torch.float32
    torch.testing.assert_close(
        reward, judge()(half.batch(encoded, videos)), atol=0.05, rtol=0.05
    )


def test_new_reward_model_on_a_base(tmp_path):
    base = save_tiny_qwen(tmp_path / "base")
    plain = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS, seed=5)
    assert plain.query_id == 264  # first row that no token uses
    assert plain.backbone.get_input_embeddings().weight.shape[0] == 320
    again = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS, seed=5)
    assert torch.equal(plain.head.weight, again.head.weight)
    other = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS, seed=6)
    assert not torch.equal(plain.head.weight, other.head.weight)
    with pytest.raises(ValueError, match="patch_size=16"):
        DeScore.from_base(base)  # the full-size defaults
    SETTINGS.save(base / "video.json")
    assert DeScore.from_base(base).template == DEFAULT_TEMPLATE
    TEMPLATE.save(base / "prompt.json")
    assert DeScore.from_base(base).template == TEMPLATE


@torch.no_grad()
def test_a_vocabulary_without_free_rows_grows_to_a_multiple_of_64(tmp_path, videos):
    base = save_tiny_qwen(tmp_path / "base", vocab_size=264)
    model = DeScore.from_base(base, template=TEMPLATE, settings=SETTINGS).eval()
    assert model.query_id == 264
    assert model.backbone.get_input_embeddings().weight.shape[0] == 320
    batch = model.batch([model.encode("a", videos[0])], videos[:1])
    model.save(tmp_path / "judge")
    torch.testing.assert_close(
        DeScore.load(tmp_path / "judge")(batch), model(batch), atol=1e-6, rtol=0
    )


def test_missing_model_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"descore\.json"):
        DeScore.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DeScore.from_base(tmp_path)
    judge().save(tmp_path)
    (tmp_path / DESCORE_FILE).write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format"):
        DeScore.load(tmp_path)


def no_head(tensors):
    tensors.pop("head")


def other_head(tensors):
    tensors["weight"] = tensors.pop("head")


def two_rows(tensors):
    tensors["query"] = tensors["query"].repeat(2, 1)


def nan_query(tensors):
    tensors["query"][0, -1] = torch.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_head, "missing head"),
        (other_head, "unexpected weight"),
        (two_rows, r"query is \(2, 32\), want \(1, 32\)"),
        (nan_query, "NaN or infinite, in 1 tensors: query"),
    ],
)
def test_head_that_does_not_fit_is_refused(tmp_path, change, words):
    judge().save(tmp_path)
    tensors = load_file(tmp_path / HEAD_FILE)
    change(tensors)
    save_file(tensors, tmp_path / HEAD_FILE)
    with pytest.raises(ValueError, match=words) as caught:
        DeScore.load(tmp_path)
    assert HEAD_FILE in str(caught.value)


@pytest.mark.parametrize("name", [HEAD_FILE, "model.safetensors"])
def test_cut_weights_are_named(tmp_path, name):
    judge().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
    with pytest.raises(ValueError, match="whole safetensors file") as caught:
        DeScore.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"format": 1}', '{"format": 1, "query_id": 3}']
)
def test_record_that_cannot_be_read_is_named(tmp_path, text):
    judge().save(tmp_path)
    (tmp_path / DESCORE_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"descore\.json"):
        DeScore.load(tmp_path)


def test_lost_weights_are_named_by_both_loaders(tmp_path):
    """A model to train starts from a sound base only."""
    judge().save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = "model.language_model.layers.1.self_attn.q_proj.weight"
    tensors.pop(lost)
    save_file(tensors, file)
    for load in (DeScore.load, DeScore.from_base):
        with pytest.raises(ValueError, match=lost):
            load(tmp_path)


def test_wrong_settings_and_batches(model, videos):
    with pytest.raises(ValueError, match="merge_size=4"):
        DeScore(
            tiny_qwen(),
            tiny_tokenizer(),
            TEMPLATE,
            VideoSettings(patch_size=8, merge_size=4),
            264,
        )
    with pytest.raises(ValueError, match=r"\b0\b"):
        model.batch([], [])
