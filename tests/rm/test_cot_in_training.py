"""How a reward model was trained is in its folder, and scoring follows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from common.types import Score
from rm.calibration import CALIBRATION_FILE, Calibration
from rm.cold_start import ColdStart
from rm.config import ColdStartConfig, DualRlConfig, Generation, Masking
from rm.data import PairSchedule
from rm.dual_rl import DualRl
from rm.model import DESCORE_FILE, DeScore
from rm.scorer import DeScoreScorer
from rm.text_rewards import RuleRewardConfig
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

PROMPTS = ["a", "two cats", "x" * 40]
# A random model's CoTs never end within two tokens, nor within twice as many.
SHORT = Generation(max_new_tokens=2, repetition_penalty=1.0)


def model_of() -> DeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, SHORT)
    return model.eval()


def videos() -> torch.Tensor:
    return torch.stack([random_frames(i) for i in range(len(PROMPTS))])


def saved(folder: Path, word: str | None) -> Path:
    """A checkpoint that says how it was trained; None makes one of version 0.1."""
    model = model_of()
    model.cot_in_training = word
    model.save(folder)
    if word is None:
        record = json.loads((folder / DESCORE_FILE).read_text())
        del record["cot_in_training"]
        (folder / DESCORE_FILE).write_text(json.dumps(record))
    return folder


def scored(scorer: DeScoreScorer) -> Score:
    return scorer.score(videos(), PROMPTS, fps=4.0)


@pytest.mark.parametrize(
    ("probability", "word"), [(0.0, "always"), (0.5, "masked"), (1.0, "never")]
)
def test_stage_1_records_its_masking(probability: float, word: str) -> None:
    model = model_of()
    ColdStart(
        ColdStartConfig(masking=Masking(probability=probability)),
        model=model,
        engine=None,
        pairs=[],
        schedule=PairSchedule(1, pairs_per_step=1, seed=0),
        seed=0,
    )
    assert model.cot_in_training == word


def test_stage_2_records_that_cots_were_there() -> None:
    model = model_of()
    model.cot_in_training = "never"
    DualRl(
        DualRlConfig(),
        rules=RuleRewardConfig(),
        model=model,
        engine=None,
        pairs=[],
        schedule=PairSchedule(1, pairs_per_step=1, seed=0),
        seed=0,
    )
    assert model.cot_in_training == "always"


@pytest.mark.parametrize(
    ("word", "cots"), [("never", 0), ("masked", 1), ("always", 1), (None, 1)]
)
def test_default_number_of_cots_follows_the_training(
    tmp_path: Path, word: str | None, cots: int
) -> None:
    folder = saved(tmp_path, word)
    scorer = DeScoreScorer.load(folder)
    assert scorer.cots == cots
    assert scorer.model.cot_in_training == word
    # saved once more, for example by stage 2 or an export
    scorer.model.save(tmp_path / "again")
    assert DeScore.cot_in_training_of(tmp_path / "again") == word


def test_model_without_cot_is_scored_as_with_0_cots(tmp_path: Path) -> None:
    folder = saved(tmp_path, "never")
    found = scored(DeScoreScorer.load(folder))
    assert found.value_B.isfinite().all()
    assert torch.equal(
        found.value_B, scored(DeScoreScorer.load(folder, cots=0)).value_B
    )
    assert (list(found.texts), list(found.reasons)) == (["", "", ""], [])


def test_cots_of_a_model_without_cot_are_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of()
    model.cot_in_training = "never"
    assert DeScoreScorer(model, cots=2).cots == 2
    assert "WARNING: cots=2" in capsys.readouterr().out
    DeScoreScorer(model, cots=0)
    DeScoreScorer(model)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="cots"):
        DeScoreScorer(model, value="overall")


def test_unknown_word_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "masked")
    record = json.loads((folder / DESCORE_FILE).read_text())
    (folder / DESCORE_FILE).write_text(json.dumps(record | {"cot_in_training": "no"}))
    with pytest.raises(ValueError, match=rf"{DESCORE_FILE}.*'no'"):
        DeScoreScorer.load(folder)


@pytest.mark.parametrize(
    ("option", "meant"), [("chains", "cots"), ("calibrate", "calibration")]
)
def test_unknown_option_names_the_one_that_was_meant(
    tmp_path: Path, option: str, meant: str
) -> None:
    """Before anything is read: there is no folder."""
    with pytest.raises(ValueError, match=f"{option!r}.* did you mean {meant!r}"):
        DeScoreScorer.load(tmp_path / "none", **{option: 1})


def test_old_option_of_a_reward_names_the_new_one(tmp_path: Path) -> None:
    old = RewardConfig(checkpoint=str(tmp_path), options={"chains": 0})
    with pytest.raises(ValueError, match=r"rewards\.descore: .*'cots'"):
        build_rewards({"descore": old})


def test_calibration_of_version_0_1_is_read(tmp_path: Path) -> None:
    old = {"mean": {"overall": 1.5}, "std": {"overall": 2.0}, "videos": 4, "chains": 3}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(old))
    found = Calibration.load(tmp_path)
    assert found.cots == 3
    found.save(tmp_path)
    written = json.loads((tmp_path / CALIBRATION_FILE).read_text())
    assert (written["cots"], "chains" in written) == (3, False)
    assert Calibration.load(tmp_path) == found


def test_score_says_that_the_cot_did_not_end() -> None:
    found = scored(DeScoreScorer(model_of()))
    assert found.value_B.isnan().all()
    # the second try has twice the limit of 2
    assert all("within 4 tokens" in reason for reason in found.reasons)


def test_score_says_that_the_cot_states_no_overall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    speak_plainly(model.backbone)
    model.generation = Generation(
        max_new_tokens=80, temperature=2.0, repetition_penalty=1.0
    )
    answers = {True: '<answer>{"dimensional_scores": {}, "overall_score": 4}</answer>'}
    monkeypatch.setattr(
        model.tokenizer, "decode", lambda ids: answers.get(len(ids) % 2 == 0, "no")
    )
    found = scored(DeScoreScorer(model, value="overall"))
    states_one = [not math.isnan(value) for value in found.value_B.tolist()]
    assert [reason == "" for reason in found.reasons] == states_one
    assert {"no overall" in reason for reason in found.reasons if reason} == {True}


def test_score_says_that_the_output_is_nan() -> None:
    model = model_of()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    found = scored(DeScoreScorer(model, cots=0))
    assert {"output is NaN" in reason for reason in found.reasons} == {True}


def test_reasons_follow_their_videos() -> None:
    failed = Score(torch.full((2,), math.nan), reasons=["late", "broken"])
    both = Score.concat([Score(torch.tensor([1.0])), failed])
    assert both.reasons == ["", "late", "broken"]
    assert both.take([2, 0]).reasons == ["broken", ""]
    assert Score.placed(4, [([3, 1], failed)]).reasons == ["", "broken", "", "late"]
    whole = Score(torch.tensor([1.0, math.nan, math.inf]), reasons=["", "late", ""])
    assert [whole.reason(i) for i in range(3)] == ["", "late", "the score is inf"]
    with pytest.raises(ValueError, match="reasons"):
        Score(torch.zeros(2), reasons=["late"])
