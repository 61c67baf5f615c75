"""Generative rewards: the input is what the model expects, and answers become numbers or NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from alignment.rewards.generative import Generative
from rm.baselines.generative import FORMS
from tests import public_checkpoints as public
from tests.tiny_qwen import lively, random_frames, tiny_tokenizer, vision_ids

PROMPTS = ["a cat", "many dogs", "rain"]
VIDEO = torch.stack([random_frames(i, frames=8, size=56) for i in range(3)])
INSTRUCTION = "\nRate the video.\nVideo prompt: {prompt}\n"
THOUGHT = (
    "<think>visual quality: 2 at first sight</think>\n(1) visual quality – clarity: 4;\n"
    "(2) text-to-video alignment: 3,\n(3) Physical/common-sense consistency – natural: 5"
)


def tiny_qwen2_5() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    text = {
        name: value
        for name, value in public.text_config().items()
        if name != "tie_word_embeddings"
    }
    return lively(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(vision_config=vision, text_config=text, **vision_ids()),
    )


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    (
        public.tiny_qwen2() if request.param == "qwen2_vl" else tiny_qwen2_5()
    ).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "instruction.txt").write_text(INSTRUCTION)
    return path


def reward_of(folder: Path, **options: object) -> Generative:
    options = {
        "instruction": str(folder / "instruction.txt"),
        "max_pixels": 28 * 28 * 4,
        **options,
    }
    config = RewardConfig(kind="generative", checkpoint=str(folder), options=options)
    (reward,) = build_rewards({"it": config}).values()
    return reward


def says(
    reward: Generative, *answers: str, digits: dict[int, float] | None = None
) -> None:
    """Let the model write these words; ``digits`` gives the probability weights of a digit."""
    tokenizer = reward.reward_model.tokenizer
    scripts = [
        [*tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers
    ]
    words = iter([token for script in scripts for token in script])

    def speak(
        module: torch.nn.Module, args: tuple, logits: torch.Tensor
    ) -> torch.Tensor:
        wanted = next(words)
        forced = torch.full_like(logits, -50.0)
        forced[..., wanted] = 0.0
        if digits and tokenizer.decode([wanted]).isdigit():
            for digit, share in digits.items():
                forced[..., tokenizer.encode(str(digit))[0]] = math.log(share)
        return forced

    reward.reward_model.model.lm_head.register_forward_hook(speak)


def test_generative_prompt_has_chat_video_and_time(folder: Path) -> None:
    """8 frames at 2 fps are 4 s: all are seen, two in a patch, a patch a second."""
    reward = reward_of(folder)
    inputs = reward.reward_model.inputs(VIDEO[0], "a cat", fps=2.0)
    grid = inputs["video_grid_thw"][0].tolist()
    assert grid == [4, 4, 4]
    text = public.CHAT.format(
        pads="<|video_pad|>" * 16, text=INSTRUCTION.format(prompt="a cat")
    )
    assert (
        inputs["input_ids"][0].tolist() == reward.reward_model.tokenizer(text).input_ids
    )
    assert inputs["mm_token_type_ids"].sum() == 2 * 16
    if reward.reward_model.model.config.model_type == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [1.0]
        assert reward.reward_model.inputs(VIDEO[0], "a cat", fps=8.0)[
            "second_per_grid_ts"
        ].tolist() == [0.5]  # 4 of 1 s

    def first_logits(video: torch.Tensor) -> torch.Tensor:
        found = reward.reward_model.inputs(video, "a cat", fps=2.0)
        return reward.reward_model.model(**found).logits[0, -1]

    assert float((first_logits(VIDEO[0]) - first_logits(VIDEO[1])).abs().max()) > 1e-3


def test_generative_reads_numbers_after_labels(folder: Path) -> None:
    """The last number of each label counts; the mean of 4, 3, 5 is 4."""
    reward = reward_of(folder)
    says(reward, THOUGHT, THOUGHT.replace("natural: 5", "natural: 6"), "nothing at all")
    found = reward.score(VIDEO, PROMPTS, fps=2.0)
    assert found.texts[0] == THOUGHT
    assert {name: float(part[0]) for name, part in found.parts.items()} == {
        "visual": 4,
        "alignment": 3,
        "physics": 5,
    }
    assert float(found.value_B[0]) == 4.0
    assert [math.isnan(v) for v in found.value_B.tolist()] == [
        False,
        True,
        True,
    ]  # 6 is no score out of 5
    assert [float(found.parts["visual"][i]) for i in range(2)] == [4.0, 4.0]
    assert found.parts["physics"].isnan().tolist() == [False, True, True]


def test_published_forms_read_published_examples(folder: Path) -> None:
    answer = (
        "visual quality: 4\ntemporal consistency: 4\ndynamic degree: 3\n"
        "text-to-video alignment: 1\nfactual consistency: 2\nFinal Score: 6"
    )
    reward = reward_of(folder, form="unifiedreward")
    says(reward, answer)
    found = reward.score(VIDEO[:1], PROMPTS[:1], fps=2.0)
    assert [float(part[0]) for part in found.parts.values()] == [4, 4, 3, 1, 2, 6]
    assert found.value_B.tolist() == [6.0]
    reward = reward_of(folder, form="unifiedreward2", value="physics")
    says(
        reward,
        "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.0987\nStyle Score (1-5): 3.3889",
    )
    found = reward.score(VIDEO[:1], PROMPTS[:1], fps=2.0)
    torch.testing.assert_close(found.value_B, torch.tensor([3.0987]))
    assert set(FORMS) == {"videoscore2", "unifiedreward", "unifiedreward2"}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Final Score: 6", "6"),
        ("**Final Score:** 6", "6"),
        ("**Final Score**: **6**/10", "6"),
        ("Final Score: **6**", "6"),
        ("**Final Score: 6**", "6"),
        ("**Final** **Score**: 6", "6"),
        ("final_score: 6", "6"),
        ("Final Score is 6", "6"),
        ("Final score is **6**", "6"),
        ("Final Score: [6]", "6"),
        ("Final Score: <6>", "6"),
        ("Final Score: `6`", "6"),
        ("Final Score\uff1a 6", "6"),
        ("Final Score = 6", "6"),
        ("| Final Score | 6 |", "6"),
        ("Final Score (1-10):\n7", "7"),
        ("Final Score: 8.5.", "8.5"),
        ("<think>Final Score: 3</think> Final Score: 6", "6"),
        ("Final Score: 4, no: Final Score: 6", "6"),
        # no score, or none that is meant
        ("Final Score: six", None),
        ("Final Score: 3-4", None),
        ("Final Score: 13 - 14", None),
        ("Final Score is between 1 and 10", None),
        ("Final Score: above 6", None),
        ("<think>Final Score: 3</think> a good video", None),
        ("The final verdict: 6", None),
    ],
)
def test_score_field_finds_the_number(answer: str, number: str | None) -> None:
    match = FORMS["unifiedreward"].labels["final"].find(answer)
    assert (match and match[1]) == number


def test_answer_cut_at_the_limit_has_no_score(folder: Path) -> None:
    """The first answer is as long as the limit, with its end; the second is cut before it."""
    form = {"quality": ["quality", 1, 5]}
    whole = "quality: 2 at first, quality: 4"
    limit = len(whole) + 1  # a token a byte, and the end
    reward = reward_of(folder, form=form, max_new_tokens=limit)
    says(reward, whole, whole + " or 5, said quickly")
    found = reward.score(VIDEO[:2], PROMPTS[:2], fps=2.0)
    assert float(found.value_B[0]) == 4.0
    assert found.texts[0] == whole
    assert found.value_B[1].isnan()
    assert found.parts["quality"][1].isnan()
    assert f"max_new_tokens={limit}" in found.texts[1]


def test_answer_that_ends_in_a_thought_has_no_score(folder: Path) -> None:
    form = {"quality": ["quality", 1, 5]}
    reward = reward_of(folder, form=form)
    says(reward, "<think>quality: 2 at first", "<think>so</think>quality: 3", "none")
    found = reward.score(VIDEO, PROMPTS, fps=2.0)
    assert found.value_B[0].isnan()
    assert "unfinished" in found.texts[0]
    assert float(found.value_B[1]) == 3.0
    assert found.value_B[2].isnan()
    assert "quality" in found.texts[2]


def test_expected_digit_is_mean_by_probability(folder: Path) -> None:
    """The digit has weight 1, others 0.2 and 0.1: (3 + 4 * 0.2 + 5 * 0.1) / 1.3."""
    reward = reward_of(folder, form={"quality": ["quality", 1, 5]}, expected=True)
    says(reward, "well, 3 of 5, quality of it: 3", digits={4: 0.2, 5: 0.1})
    found = float(reward.score(VIDEO[:1], PROMPTS[:1], fps=2.0).value_B[0])
    assert found == pytest.approx(4.3 / 1.3, abs=1e-5)


def test_scores_follow_a_permuted_batch(folder: Path) -> None:
    reward, order = reward_of(folder, max_new_tokens=3), [2, 0, 1]
    plain = reward.score(VIDEO, PROMPTS, fps=2.0)
    turned = reward.score(VIDEO[order], [PROMPTS[i] for i in order], fps=2.0)
    assert turned.texts == [plain.texts[i] for i in order]
    assert plain.value_B.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"form": "vbench"},
            "'vbench'",
        ),
        (
            {"form": {"a": ["a", 1]}},
            r"options\.form\.a",
        ),
        ({"form": {"a": ["a", 5, 1]}}, r"\blow\b"),
        ({"form": {}}, "label"),
        ({"value": "beauty"}, "value='beauty'"),
        ({"form": "unifiedreward", "expected": True}, "digits"),
        ({"instruction": None}, r"options\.instruction"),
    ],
)
def test_what_cannot_be_is_named(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_of(folder, **options)


def test_other_model_class_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="clip"):
        Generative(tmp_path, instruction=folder / "instruction.txt")
    with pytest.raises(ValueError, match="checkpoint"):
        build_rewards({"generative": RewardConfig()})
