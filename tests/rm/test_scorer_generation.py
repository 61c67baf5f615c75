"""How the scorer writes CoTs: temperature, penalty, unfinished CoTs, evaluation mode."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import rm.scorer
from rm.config import Generation
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from tests.rm.test_scorer import PROMPTS
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

VIDEOS = [random_frames(i) for i in range(3)]


def scorer_of(how: Generation, **options: object) -> DeScoreScorer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, how)
    speak_plainly(model.backbone)
    return DeScoreScorer(model.train(), **options)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """The settings of every call of `generate`."""
    seen: list[Generation] = []
    original = rm.scorer.generate

    def note(model, batch, how, **options):
        seen.append(how)
        return original(model, batch, how, **options)

    monkeypatch.setattr(rm.scorer, "generate", note)
    return seen


def test_several_cots_sample_at_temperature_1_of_a_greedy_checkpoint(settings) -> None:
    greedy = Generation(max_new_tokens=6, temperature=0.0, repetition_penalty=1.0)
    scorer_of(greedy, cots=2).score(VIDEOS, PROMPTS[:3], fps=4.0)
    assert {how.temperature for how in settings} == {1.0}


def test_repetition_penalty_of_the_checkpoint_is_used(settings) -> None:
    plain = Generation(max_new_tokens=30, temperature=0.0, repetition_penalty=1.0)
    penalised = replace(plain, repetition_penalty=5.0)
    first = scorer_of(plain).score(VIDEOS, PROMPTS[:3], fps=4.0)
    second = scorer_of(penalised).score(VIDEOS, PROMPTS[:3], fps=4.0)
    assert settings[-1].repetition_penalty == 5.0
    assert first.texts != second.texts


def test_only_unfinished_cots_go_on(settings, monkeypatch) -> None:
    warm = Generation(max_new_tokens=80, temperature=2.0, repetition_penalty=1.0)
    scorer = scorer_of(warm)
    lengths = [len(text) for text in scorer.score(VIDEOS, PROMPTS[:3], fps=4.0).texts]
    assert len(set(lengths)) > 1
    # at this limit the longest does not finish at first, all others do
    limit = max(lengths)
    scorer.model.generation = replace(warm, max_new_tokens=limit)
    extended: list[tuple[int, int]] = []
    original = rm.scorer.extend

    def note(model, cots, rows, how, **options):
        extended.append((len(rows), how.max_new_tokens))
        return original(model, cots, rows, how, **options)

    monkeypatch.setattr(rm.scorer, "extend", note)
    settings.clear()
    score = scorer.score(VIDEOS, PROMPTS[:3], fps=4.0)
    assert [how.max_new_tokens for how in settings] == [limit]
    assert extended == [(lengths.count(limit), 2 * limit)]
    assert bool(score.value_B.isfinite().all())


def test_overall_score_of_an_unfinished_cot_does_not_count(monkeypatch) -> None:
    scorer = scorer_of(
        Generation(max_new_tokens=1, temperature=0.0, repetition_penalty=1.0),
        value="overall",
    )
    answer = f"<answer>{json.dumps({'dimensional_scores': {}, 'overall_score': '4.2'})}</answer>"
    monkeypatch.setattr(scorer.model.tokenizer, "decode", lambda ids: answer)

    def unfinished(original):
        def written(*args, **options):
            cots = original(*args, **options)
            return replace(cots, finished_B=torch.zeros_like(cots.finished_B))

        return written

    for name in ("generate", "extend"):
        monkeypatch.setattr(rm.scorer, name, unfinished(getattr(rm.scorer, name)))
    value_B = scorer.score(VIDEOS, PROMPTS[:3], fps=4.0).value_B
    assert all(math.isnan(value) for value in value_B.tolist())


def test_videos_of_equal_bytes_and_other_shape_are_different() -> None:
    flat = random_frames(0)
    other = flat.reshape(flat.shape[0], flat.shape[2], flat.shape[1], 3)
    assert rm.scorer.identity(flat, "a") == rm.scorer.identity(flat.clone(), "a")
    if flat.shape != other.shape:
        assert rm.scorer.identity(flat, "a") != rm.scorer.identity(other, "a")
    halves = flat.reshape(flat.shape[0] * 2, flat.shape[1] // 2, flat.shape[2], 3)
    assert rm.scorer.identity(flat, "a") != rm.scorer.identity(halves, "a")


def test_scorer_is_in_evaluation_mode_and_frozen() -> None:
    scorer = scorer_of(Generation(max_new_tokens=4))
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
