"""A scorer that thinks when unsure: groups by one way, the audit, off is bit-identical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.types import RewardModel, Score
from rm.adaptive import AdaptiveScorer, load_scorer
from rm.cascade import Thinking, Threshold
from rm.config import Generation
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

PAIRS = Threshold(
    confidence=2.0,
    method="clopper_pearson",
    risk="harm",
    alpha=0.02,
    delta=0.05,
    n=200,
    losses=0,
    thought=0.5,
    sha256=(),
)
# 1 - 2 U >= 0.5
GROUPS = replace(PAIRS, confidence=0.5, method="crc", risk="disagreement")
RULE = Thinking(offset=1.0, slope=2.0, sigma=1.0, cots=1, pairs=PAIRS, groups=GROUPS)
WRITING = Generation(max_new_tokens=80, temperature=2.0, repetition_penalty=1.0)


class NamedScores:
    """Scores a path "FAST_SLOW_anything" without a model, and counts the videos."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.scored: list[str] = []

    def score(
        self, videos: Sequence[str], prompts: Sequence[str], *, fps: float | None
    ) -> Score:
        self.scored += videos
        values = [float(video.split("_")[self.column]) for video in videos]
        texts = ["" if self.column == 0 else "thought"] * len(videos)
        parts = {} if self.column == 0 else {"subject": torch.ones(len(videos))}
        return Score(torch.tensor(values), parts, texts)


@pytest.fixture
def named() -> AdaptiveScorer:
    return with_rule(RULE)


def with_rule(rule: Thinking, *, audit: float = 0.0) -> AdaptiveScorer:
    """A scorer whose fast and slow scores stand in the names of the videos."""
    scorer = AdaptiveScorer.__new__(AdaptiveScorer)
    scorer.fast = NamedScores(0)
    scorer.slow = NamedScores(1)
    scorer.thinking = rule
    scorer.audit = audit
    scorer.always = False
    return scorer


def test_pair_is_fast_where_its_margin_reaches_the_threshold(
    named: AdaptiveScorer,
) -> None:
    """Fast rewards become 1 + 2 r: the margins of p and q are 2 and 1.5, the threshold is 2."""
    videos = ["0_7", "1_8", "0_7_", "0.75_-3"]
    score = named.score(videos, ["p", "p", "q", "q"])
    assert score.value_B.tolist() == [1, 3, 7, -3]
    assert score.parts["thought"].tolist() == [0, 0, 1, 1]
    assert score.parts["confidence"].tolist() == [2, 2, 1.5, 1.5]
    assert score.texts == ["", "", "thought", "thought"]
    assert score.parts["subject"].isnan().tolist() == [True, True, False, False]
    assert named.slow.scored == ["0_7_", "0.75_-3"]


def test_group_is_scored_by_one_way_and_a_single_video_is_thought_about(
    named: AdaptiveScorer,
) -> None:
    """Fast (1, 3, 7): no gap below 2 sigma; (1, 1.02, 1.04): nothing tells them apart."""
    sure = ["0_1_a", "1_2_a", "3_3_a"]
    unsure = ["0_4_b", "0.01_5_b", "0.02_6_b"]
    prompts = ["a", "b"] * 3
    videos = [sure[0], unsure[0], sure[1], unsure[1], sure[2], unsure[2], "5_9"]
    score = named.score(videos, [*prompts, "alone"])
    assert score.value_B.tolist() == [1, 4, 3, 5, 7, 6, 9]
    assert score.parts["thought"].tolist() == [0, 1, 0, 1, 0, 1, 1]
    # 1 - 2 U
    erfc = [math.erfc(gap / 2) for gap in (0.02, 0.02, 0.04)]
    assert score.parts["confidence"][1].item() == pytest.approx(
        1 - sum(erfc) / 3, abs=1e-5
    )
    assert sorted(named.fast.scored) == sorted(videos[:6])


def test_groups_may_be_others_than_the_prompts(named: AdaptiveScorer) -> None:
    """Two pairs of the same prompt: margins 2 and 0, not a group of four."""
    videos = ["0_1", "1_2", "0_3", "0_4_"]
    score = named.score(videos, ["p"] * 4, groups=[0, 0, 1, 1])
    assert score.value_B.tolist() == [1, 3, 3, 4]


def test_order_of_the_call_changes_nothing() -> None:
    scorer = with_rule(RULE, audit=0.5)
    videos = [f"{i % 3}_{i % 5}_{i}" for i in range(24)]
    prompts = [f"p{i % 6}" for i in range(24)]
    score = scorer.score(videos, prompts)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    permuted = scorer.score([videos[i] for i in order], [prompts[i] for i in order])
    assert torch.equal(permuted.value_B, score.value_B[order])
    for name, part_B in score.parts.items():
        assert torch.equal(
            permuted.parts[name].nan_to_num(-1), part_B[order].nan_to_num(-1)
        ), name


def test_audit_thinks_about_its_share_of_fast_groups_and_sees_the_discordance() -> None:
    """2000 pairs, all fast, of which a fifth has the opposite order after thinking."""
    scorer = with_rule(RULE, audit=0.1)
    videos = []
    prompts = []
    for i in range(2000):
        slow = (5, 6) if i % 5 else (6, 5)
        videos += [f"0_{slow[0]}_{i}", f"9_{slow[1]}_{i}"]
        prompts += [f"p{i}"] * 2
    score = scorer.score(videos, prompts)
    audit_B = score.parts["audit"]
    drawn_B = ~audit_B.isnan()
    share = drawn_B.double().mean().item()
    # binomial: 0.1 and 0.2 +- 3 standard errors
    assert abs(share - 0.1) < 3 * math.sqrt(0.09 / 2000)
    assert abs(audit_B[drawn_B].mean().item() - 0.2) < 3 * math.sqrt(0.16 / 200)
    assert torch.equal(score.parts["thought"] == 1, drawn_B)
    assert len(scorer.slow.scored) == drawn_B.sum()
    # both of a pair are scored by one way, audited or not
    thought_N2 = score.parts["thought"].view(-1, 2)
    assert torch.equal(thought_N2[:, 0], thought_N2[:, 1])


def test_audit_of_a_group_that_was_thought_about_is_0() -> None:
    scorer = with_rule(RULE, audit=1.0)
    score = scorer.score(["0_2", "0.1_1"], ["p", "p"])
    assert score.parts["thought"].tolist() == [1, 1]
    assert score.parts["audit"].tolist() == [0, 0]


def test_no_threshold_always_thinks() -> None:
    scorer = with_rule(replace(RULE, pairs=replace(PAIRS, confidence=None)))
    score = scorer.score(["0_2", "99_1"], ["p", "p"])
    assert score.value_B.tolist() == [2, 1]


def test_three_videos_of_a_prompt_need_a_threshold_of_groups() -> None:
    scorer = with_rule(replace(RULE, groups=None))
    scorer.check_group_size(2)
    with pytest.raises(ValueError, match="--groups"):
        scorer.check_group_size(3)
    with pytest.raises(ValueError, match="--groups"):
        scorer.score(["0_2", "5_1", "9_1"], ["p"] * 3)


# ------------------------------------------------------------------ with a real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("descore")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, WRITING)
        model.save(path)
    return path


def plain(scorer: DeScoreScorer | AdaptiveScorer) -> DeScoreScorer | AdaptiveScorer:
    """Make a random model end its chains of thought."""
    slow = scorer.slow if isinstance(scorer, AdaptiveScorer) else scorer
    speak_plainly(slow.model.backbone)
    return scorer


@pytest.fixture(scope="module")
def video_BTYXC() -> torch.Tensor:
    return torch.stack([random_frames(i) for i in range(6)])


PROMPTS = ["a", "a", "a dog", "a dog", "two cats", "blue"]


def saved(folder: Path, confidence: float | None) -> Path:
    pairs = replace(PAIRS, confidence=confidence)
    replace(RULE, pairs=pairs, offset=0.0, slope=1.0).save(folder)
    return folder


def test_always_and_never_are_the_scorer_to_the_bit(
    folder: Path, video_BTYXC: torch.Tensor
) -> None:
    for mode, cots in (("always", None), ("never", 0)):
        found = plain(load_scorer(folder, thinking=mode))
        want = plain(DeScoreScorer.load(folder, cots=cots))
        assert type(found) is DeScoreScorer
        a = found.score(video_BTYXC, PROMPTS, fps=4.0)
        b = want.score(video_BTYXC, PROMPTS, fps=4.0)
        assert a.value_B.isfinite().all()
        assert torch.equal(a.value_B, b.value_B)
        assert a.texts == b.texts
        assert a.parts.keys() == b.parts.keys()


def test_adaptive_gives_the_rewards_of_both_ways(
    folder: Path, video_BTYXC: torch.Tensor
) -> None:
    """A threshold below every margin, then above: the fast and the slow rewards."""
    without = plain(load_scorer(folder, thinking="never"))
    fast = without.score(video_BTYXC, PROMPTS, fps=4.0)
    slow = plain(load_scorer(folder)).score(video_BTYXC, PROMPTS, fps=4.0)
    sure = plain(load_scorer(saved(folder, 0.0), thinking="adaptive", audit=0))
    assert isinstance(sure, RewardModel)
    found = sure.score(video_BTYXC, PROMPTS, fps=4.0)
    # a single video of a prompt is always thought about
    want_B = torch.cat([fast.value_B[:4], slow.value_B[4:]])
    torch.testing.assert_close(found.value_B, want_B, atol=1e-5, rtol=0)
    assert found.parts["thought"].tolist() == [0, 0, 0, 0, 1, 1]
    assert (fast.value_B - slow.value_B).abs().max() > 1e-3

    unsure = plain(load_scorer(saved(folder, None), thinking="adaptive"))
    found = unsure.score(video_BTYXC, PROMPTS, fps=4.0)
    assert torch.equal(found.value_B, slow.value_B)
    assert found.texts == slow.texts
    # the same when an audit has ended fast scoring
    sure.always = True
    found = sure.score(video_BTYXC, PROMPTS, fps=4.0)
    assert torch.equal(found.value_B, slow.value_B)


def test_thresholds_of_other_scores_are_refused(folder: Path) -> None:
    saved(folder, 1.0)
    with pytest.raises(ValueError, match="cots=1, not cots=2"):
        load_scorer(folder, thinking="adaptive", cots=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"thinking": "sometimes"}, "adaptive"),
        ({"thinking": "never", "cots": 2}, "cots=2"),
        ({"thinking": "adaptive", "cots": 0}, "cots=0"),
        ({"thinking": "adaptive", "value": "overall"}, "value=overall"),
        ({"thinking": "adaptive", "calibrated": True}, "calibrated"),
        ({"thinking": "adaptive", "audit": 1.5}, "audit=1.5"),
        ({"audit": 0.1}, "thinking=adaptive"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_loading(
    options: dict, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        load_scorer("nowhere", **options)
