"""The scorer loads a folder and scores frames or files, with or without CoT."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace

import pytest
import torch

from common.film import Film
from common.types import RewardModel
from common.video_io import write_mp4
from rm.config import Generation
from rm.model import DeScore
from rm.scorer import DeScoreScorer, _parts
from rm.video import VideoError, prepare
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

PROMPTS = [
    "a",
    "a red ball moves left",
    "two cats",
    "x" * 40,
    "blue",
    "a dog",
    "night",
    "two red cats",
]
# sampling, so that a random model's chains end at different lengths
WRITING = Generation(max_new_tokens=80, temperature=2.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, WRITING).save(
            path
        )
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    return speaking(folder)


def speaking(folder, **options):
    scorer = DeScoreScorer.load(folder, **options)
    speak_plainly(scorer.model.backbone)
    return scorer


@pytest.fixture(scope="module")
def video_BTYXC():
    return torch.stack([random_frames(i) for i in range(len(PROMPTS))])


@pytest.fixture(scope="module")
def score(scorer, video_BTYXC):
    return scorer.score(video_BTYXC, PROMPTS, fps=4.0)


def test_scorer_fills_the_reward_protocol(scorer):
    assert isinstance(scorer, RewardModel)
    assert scorer.name == "descore"


@torch.no_grad()
def test_scores_are_the_full_forward_over_the_texts(scorer, score, video_BTYXC):
    videos = [prepare(video, SETTINGS, fps=4.0) for video in video_BTYXC]
    encoded = [
        scorer.model.encode(p, v, t)
        for p, v, t in zip(PROMPTS, videos, score.texts, strict=True)
    ]
    want = scorer.model(scorer.model.batch(encoded, videos)).squeeze(1)
    torch.testing.assert_close(score.value_B, want, atol=1e-5, rtol=0)
    assert len({len(text) for text in score.texts}) > 3
    assert want.std() > 1e-3
    assert score.value_B.dtype == torch.float32
    assert set(score.parts) == {"subject", "dynamics", "camera", "environment", "style"}


def test_a_text_is_no_list_of_prompts_or_videos(scorer, video_BTYXC):
    for videos, prompts in ((video_BTYXC[:1], "x"), ("a.mp4", ["x"] * 5)):
        with pytest.raises(TypeError, match="must be a list"):
            scorer.score(videos, prompts, fps=4.0)


def test_permuting_the_batch_permutes_the_scores(scorer, score, video_BTYXC):
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    permuted = scorer.score(video_BTYXC[order], [PROMPTS[i] for i in order], fps=4.0)
    assert permuted.texts == [score.texts[i] for i in order]
    torch.testing.assert_close(
        permuted.value_B, score.value_B[order], atol=0, rtol=0, equal_nan=True
    )  # to the bit


def test_batches_ignore_order_and_equal_videos_are_scored_once(
    folder, video_BTYXC, monkeypatch
):
    scorer = DeScoreScorer.load(folder, cots=0, batch=3)
    asked: list[list[str]] = []
    judge = scorer._cot_rewards
    monkeypatch.setattr(
        scorer,
        "_cot_rewards",
        lambda prompts, videos: asked.append(list(prompts)) or judge(prompts, videos),
    )
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    scorer.score(video_BTYXC[order], [PROMPTS[i] for i in order], fps=4.0)
    assert asked[:3] == asked[3:]
    twice = [0, 1, 0, 0]
    asked.clear()
    found = scorer.score(video_BTYXC[twice], [PROMPTS[i] for i in twice], fps=4.0)
    assert [len(part) for part in asked] == [2]
    assert found.value_B[0] == found.value_B[2] == found.value_B[3] != found.value_B[1]
    other = scorer.score(
        video_BTYXC[[0, 0]], PROMPTS[:2], fps=4.0
    ).value_B  # one video, two prompts
    assert other[0] != other[1]


def test_the_size_of_a_batch_changes_nothing(folder, score, video_BTYXC):
    small = speaking(folder, batch=3).score(list(video_BTYXC), PROMPTS, fps=4.0)
    assert small.texts == score.texts
    torch.testing.assert_close(
        small.value_B, score.value_B, atol=1e-6, rtol=0, equal_nan=True
    )


@pytest.mark.parametrize("cots", [0, 1])
def test_halved_batch_gives_equal_scores(folder, video_BTYXC, monkeypatch, cots):
    """Memory runs out in the forward itself; `common.memory` frees what its error holds."""
    whole = speaking(folder, cots=cots)
    want = whole.score(video_BTYXC, PROMPTS, fps=4.0)
    small = speaking(folder, cots=cots)
    hidden, seen = DeScore.hidden, []

    def limited(model, batch, **options):
        seen.append(len(batch.ids_BL))
        if len(batch.ids_BL) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(model, batch, **options)

    monkeypatch.setattr(DeScore, "hidden", limited)
    found = small.score(video_BTYXC, PROMPTS, fps=4.0)
    assert (small.portions.size, max(seen)) == (2, len(PROMPTS))
    assert found.texts == want.texts
    torch.testing.assert_close(
        found.value_B, want.value_B, atol=1e-6, rtol=0, equal_nan=True
    )


@torch.no_grad()
def test_score_only_mode_is_the_masked_sequence(folder, video_BTYXC):
    scorer = DeScoreScorer.load(folder, cots=0, batch=3)
    found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    videos = [prepare(video, SETTINGS, fps=4.0) for video in video_BTYXC]
    model = scorer.model
    want = model(
        model.batch(
            [model.encode(p, v) for p, v in zip(PROMPTS, videos, strict=True)], videos
        )
    )
    torch.testing.assert_close(found.value_B, want.squeeze(1), atol=1e-6, rtol=0)
    assert not found.parts


def test_unfinished_cots_go_on_to_twice_the_limit_then_nan(scorer, score, video_BTYXC):
    """With limit n, CoTs of at most 2 n - 1 letters are scored, from n on after going on."""
    lengths = [len(text) for text in score.texts]  # a letter is a token
    classes = [
        {(n >= limit) + (n >= 2 * limit) for n in lengths} for limit in range(41)
    ]
    limit = classes.index({0, 1, 2})  # all three happen
    before = scorer.model.generation
    scorer.model.generation = replace(before, max_new_tokens=limit)
    found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    scorer.model.generation = before
    for b, length in enumerate(lengths):
        if length < 2 * limit:
            assert found.value_B[b].item() == pytest.approx(
                score.value_B[b].item(), abs=1e-6
            )
            assert found.texts[b] == score.texts[b]
        else:
            assert math.isnan(found.value_B[b])
            assert (
                found.texts[b] == score.texts[b][: 2 * limit]
            )  # what there is of it is kept


@pytest.mark.parametrize("cots", [1, 3])
def test_cots_that_go_on_take_no_step_twice(folder, video_BTYXC, cots):
    """Limit 3, longest CoT 5 or more: 6 steps, a prompt read once; only unfinished rows go on."""
    scorer = speaking(folder, cots=cots)
    scorer.model.generation = replace(WRITING, max_new_tokens=3)
    fed: list[tuple[int, int]] = []
    model = scorer.model.backbone.model.language_model
    model.register_forward_hook(
        lambda module, args, options, output: fed.append(
            tuple(output.last_hidden_state.shape[:2])
        ),
        with_kwargs=True,
    )
    found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    assert {True, False} <= set(found.value_B.isnan().tolist())

    # Prompts, 3 steps and the query of all rows, then 3 steps and the query of those that go on.
    rows = cots * len(PROMPTS)
    left = fed[-1][0]
    assert 0 < left < rows
    assert fed[0][0] == len(PROMPTS)
    assert fed[1:] == [(rows, 1)] * 4 + [(left, 1)] * 4


def test_several_chains_are_averaged(folder, score, video_BTYXC):
    """Mean and spread are those of N single CoTs; the first is that of a single scoring."""
    many = speaking(folder, cots=3)
    found = many.score(video_BTYXC, PROMPTS, fps=4.0)
    assert found.texts == score.texts
    rewards = []
    for n in range(3):
        single = speaking(folder)
        single._seeds = lambda prompts, n=n: many._seeds(prompts)[n::3]
        rewards.append(single.score(video_BTYXC, PROMPTS, fps=4.0).value_B)
    reward_BN = torch.stack(rewards, 1)
    torch.testing.assert_close(found.value_B, reward_BN.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.parts["spread"], reward_BN.std(1, correction=0), atol=1e-5, rtol=0
    )
    assert found.parts["spread"].min() > 0


def test_a_chain_that_does_not_finish_leaves_the_mean_to_the_others(
    folder, video_BTYXC
):
    many = speaking(folder, cots=3)
    ready = [prepare(video, SETTINGS, fps=4.0) for video in video_BTYXC]
    whole_BN = many._cot_rewards(PROMPTS, ready).reward_BNK.squeeze(-1)
    many.model.generation = replace(many.model.generation, max_new_tokens=4)
    found = many.score(video_BTYXC, PROMPTS, fps=4.0)
    short_BN = many._cot_rewards(PROMPTS, ready).reward_BNK.squeeze(-1)
    done_BN = short_BN.isfinite()
    assert {1, 2} & set(done_BN.sum(1).tolist())  # some videos have both kinds
    torch.testing.assert_close(short_BN[done_BN], whole_BN[done_BN], atol=1e-5, rtol=0)
    for b in range(len(PROMPTS)):
        rest = [float(r) for r in whole_BN[b][done_BN[b]]]
        want = sum(rest) / len(rest) if rest else math.nan
        assert found.value_B[b].item() == pytest.approx(want, abs=1e-5, nan_ok=True)


def test_decodes_prefills_vision_and_heads_per_scored_video(
    folder, video_BTYXC, tmp_path, monkeypatch
):
    """1 decode, 1 model, 1 prefill, no loading of a head; whatever the number of chains."""
    import safetensors.torch
    from transformers import Qwen3VLForConditionalGeneration

    file = tmp_path / "v.mp4"
    write_mp4(file, video_BTYXC[0], 4.0)
    counts = {"decodes": 0, "vision": 0, "prefills": 0, "heads": 0}

    def count(name):
        counts[name] += 1

    real = Film.frames
    monkeypatch.setattr(
        Film, "frames", lambda *a, **k: count("decodes") or real(*a, **k)
    )
    scorer = speaking(folder, cots=4)
    model = scorer.model
    model.backbone.model.visual.register_forward_hook(lambda *_: count("vision"))
    model.backbone.model.language_model.register_forward_hook(
        lambda module, args, options, output: (
            count("prefills") if output.last_hidden_state.shape[1] > 1 else None
        ),
        with_kwargs=True,
    )
    monkeypatch.setattr(
        model,
        "reward_from_hidden",
        lambda h, plain=model.reward_from_hidden: count("heads") or plain(h),
    )
    gc.collect()
    before = sum(
        isinstance(x, Qwen3VLForConditionalGeneration) for x in gc.get_objects()
    )
    loads = []
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *a, **k: loads.append(a))
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(a))
    assert scorer.score([file], ["a"]).value_B.isfinite().all()
    assert counts == {"decodes": 1, "vision": 1, "prefills": 1, "heads": 1}
    assert loads == []
    assert (
        sum(isinstance(x, Qwen3VLForConditionalGeneration) for x in gc.get_objects())
        == before
    )
    assert isinstance(
        model.backbone, Qwen3VLForConditionalGeneration
    )  # the one that writes is the one that scores


def test_files_are_decoded_once_and_frames_never(
    folder, video_BTYXC, tmp_path, monkeypatch
):
    scorer = DeScoreScorer.load(folder, cots=0)
    files = [tmp_path / f"{b}.mp4" for b in range(3)]
    for file, video in zip(files, video_BTYXC, strict=False):
        write_mp4(file, video, 4.0)
    opened = []
    real = Film.frames
    monkeypatch.setattr(
        Film,
        "frames",
        lambda film, which: opened.append(film.name) or real(film, which),
    )
    from_files = scorer.score(files, PROMPTS[:3])
    assert sorted(opened) == [str(file) for file in files]
    scorer.score(video_BTYXC[:3], PROMPTS[:3], fps=4.0)
    assert len(opened) == 3
    mixed = scorer.score(
        [str(files[0]), video_BTYXC[1], files[2]], PROMPTS[:3], fps=4.0
    )
    torch.testing.assert_close(
        mixed.value_B[[0, 2]], from_files.value_B[[0, 2]], atol=1e-6, rtol=0
    )


def test_parts_equal_the_cot_answer():
    scores = '{"subject": "2", "dynamics": 0, "camera": "N/A"}'
    good = f'<answer>{{"dimensional_scores": {scores}}}</answer>'
    parts = _parts([good, "no answer"])
    assert parts["subject"].tolist() == pytest.approx([2.0, math.nan], nan_ok=True)
    assert parts["dynamics"].tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    assert parts["camera"].isnan().all()
    assert parts["style"].isnan().all()


def test_the_overall_score_may_be_the_value(folder, video_BTYXC, monkeypatch):
    scorer = speaking(folder, value="overall")
    said = [
        '<answer>{"dimensional_scores": {}, "overall_score": "4.20"}</answer>',
        "nothing",
    ]
    monkeypatch.setattr(
        scorer.model.tokenizer, "decode", lambda ids: said[len(ids) % 2]
    )
    found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    want = [4.2 if text == said[0] else math.nan for text in found.texts]
    assert found.value_B.tolist() == pytest.approx(want, nan_ok=True)
    assert {4.2} < {*want}
    with pytest.raises(ValueError, match="cots"):
        DeScoreScorer.load(folder, value="overall", cots=0)


@pytest.mark.parametrize("cots", [1, 3])
def test_parts_of_complete_answers(folder, video_BTYXC, monkeypatch, cots):
    """Whole numbers everywhere, and no chain without an answer."""
    scorer = speaking(folder, cots=cots)
    names = ("subject", "dynamics", "camera", "environment", "style")
    said = [
        f'<answer>{{"dimensional_scores": {json.dumps(dict.fromkeys(names, n))}}}</answer>'
        for n in range(3)
    ]
    monkeypatch.setattr(
        scorer.model.tokenizer, "decode", lambda ids: said[len(ids) % 3]
    )
    found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    assert found.parts["style"].dtype == torch.float32
    if cots == 1:
        assert found.parts["style"].tolist() == [
            float(said.index(text)) for text in found.texts
        ]
    else:
        thirds = found.parts["style"] * 3
        assert torch.equal(thirds.round(), thirds)
        assert thirds.unique().numel() > 2


def test_scorer_arguments_that_do_not_fit_raise(scorer, folder, video_BTYXC, tmp_path):
    with pytest.raises(ValueError, match="videos"):
        scorer.score(video_BTYXC[:2], PROMPTS[:1], fps=4.0)
    with pytest.raises(ValueError, match="fps"):
        scorer.score(video_BTYXC[:1], PROMPTS[:1])
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        scorer.score([tmp_path / "gone.mp4"], PROMPTS[:1])
    with pytest.raises(ValueError, match="batch=0"):
        DeScoreScorer.load(folder, batch=0)
    with pytest.raises(ValueError, match="cots=-1"):
        DeScoreScorer.load(folder, cots=-1)
    assert len(scorer.score([], []).value_B) == 0


def test_batches_are_of_like_lengths(folder, video_BTYXC, monkeypatch) -> None:
    """Prompts of 1 to 40 tokens in batches of two: sorted, the padding is the least."""
    scorer = speaking(folder, batch=2)
    batches = []
    plain = scorer.model.batch

    def recording(encoded, videos, **options):
        batches.append([len(item.prompt_ids) for item in encoded])
        return plain(encoded, videos, **options)

    monkeypatch.setattr(scorer.model, "batch", recording)
    scorer.score(video_BTYXC, PROMPTS, fps=4.0)
    lengths = [length for batch in batches for length in batch]
    assert len(lengths) == 8
    assert lengths == sorted(lengths)
