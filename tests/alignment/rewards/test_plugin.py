"""Rewards from a user's file or an installed package, and the errors of wrong files."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards, factory_of, plugin
from alignment.rewards.brightness import Brightness
from alignment.rewards.errors import (
    NamedReward,
    RewardFailedError,
    contained_score,
)
from common.types import RewardModel, Score
from tests.alignment.test_grpo import loop_of

VIDEO = torch.randint(
    0,
    256,
    (6, 2, 4, 4, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)
PROMPTS = ["a", "bb", "ccc"] * 2


def reward_of(
    tmp_path: Path, text: str, name: str = "score", **options: Any
) -> RewardModel:
    (tmp_path / "mine.py").write_text(text)
    cfg = RewardConfig(target=f"{tmp_path / 'mine.py'}:{name}", options=options)
    return build_rewards({"mine": cfg})["mine"]


def test_target_may_be_a_function(tmp_path: Path) -> None:
    reward = reward_of(
        tmp_path,
        "def score(video, prompts):\n    return video.float().mean((1, 2, 3, 4)) / 255\n",
    )
    want = Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(reward.score(VIDEO, PROMPTS, fps=8.0).value_B, want)
    assert reward.name == "mine"


def test_function_gets_fps_and_options(tmp_path: Path) -> None:
    text = (
        "def score(video, prompts, *, fps, scale=1):\n"
        "    return [scale * fps * len(prompt) for prompt in prompts]\n"
    )
    assert (
        reward_of(tmp_path, text, scale=10)
        .score(VIDEO, PROMPTS, fps=8.0)
        .value_B.tolist()
        == [80, 160, 240] * 2
    )
    with pytest.raises(
        ValueError,
        match="scael",
    ):
        reward_of(tmp_path, text, scael=10)


def test_none_and_nan_are_nan(tmp_path: Path) -> None:
    text = "def score(video, prompts):\n    return [None, float('nan'), 1, 2, 3, 4]\n"
    value = reward_of(tmp_path, text).score(VIDEO, PROMPTS, fps=8.0).value_B
    assert value.isnan().tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[1.0]", r"\b1\b"),
        ("1", r"\b1\b"),
        ("video.float().mean()", r"\b1\b"),
        ("None", r"\b1\b"),
        ("[1] * 7", "7 numbers for 6 videos"),
        ("Score(torch.zeros(5))", "5 numbers for 6 videos"),
        (
            "torch.zeros(6, 2)",
            r"a Tensor of shape \(6, 2\) for 6 videos",
        ),
        (
            "list('abcdef')",
            "'a'",
        ),
    ],
)
@pytest.mark.parametrize(
    "form",
    ["def score(video, prompts):\n    return {}", "class C:\n  @staticmethod\n  {}"],
)
def test_wrong_number_of_scores_raises(
    said: str, message: str, form: str, tmp_path: Path
) -> None:
    body = f"def score(video, prompts): return {said}" if "class" in form else said
    text = f"import torch\nfrom common.types import Score\n{form.format(body)}\n"
    reward = reward_of(tmp_path, text, "C" if "class" in form else "score")
    with pytest.raises(ValueError, match=message) as raised:
        reward.score(VIDEO, PROMPTS, fps=8.0)
    assert str(raised.value).startswith("rewards.mine: ")


def test_target_may_be_a_class_or_an_object(tmp_path: Path) -> None:
    text = """
from dataclasses import dataclass
from common.types import Score
import torch

@dataclass
class Length:
    power: int = 1

    def score(self, video_BTYXC, prompts, *, fps):
        return Score(torch.tensor([float(len(p)) ** self.power for p in prompts]))

ready = Length(3)
"""
    squares = reward_of(tmp_path, text, "Length", power=2)
    assert squares.score(VIDEO, PROMPTS, fps=8.0).value_B.tolist() == [1, 4, 9] * 2
    cubes = reward_of(tmp_path, text, "ready")
    assert cubes.score(VIDEO, PROMPTS, fps=8.0).value_B.tolist() == [1, 8, 27] * 2
    assert cubes.name == "mine"
    with pytest.raises(
        ValueError,
        match="power",
    ):
        reward_of(tmp_path, text, "ready", power=2)
    with pytest.raises(
        ValueError,
        match="pwoer",
    ):
        reward_of(tmp_path, text, "Length", pwoer=2)


@pytest.mark.parametrize("name", ["Length", "ready"])
def test_class_and_object_may_return_numbers(name: str, tmp_path: Path) -> None:
    """No fps, plain numbers, no name; by group."""
    text = """
class Length:
    group_level = True

    def score(self, videos, prompts):
        return [len(prompt) for prompt in prompts]

ready = Length()
"""
    reward = reward_of(tmp_path, text, name)
    assert reward.score(VIDEO, PROMPTS, fps=8.0).value_B.tolist() == [1, 2, 3] * 2
    assert reward.group_level
    result = loop_of({"mine": reward}).step(0)
    assert result.scores["mine"].value_B.tolist() == [
        len(p) for p in result.batch.prompts for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            "def score(v, p): ...\n",
            "scores",
            r"\.target: .*mine\.py has no 'scores'; did you mean 'score'\?",
        ),
        (
            "x = 1\ndef score(v, p)\n",
            "score",
            r"mine\.py:2: SyntaxError",
        ),
        (
            "\nimport not_here\n",
            "score",
            r"mine\.py:2: ModuleNotFoundError",
        ),
        ("x = {}['a']\n", "score", r"mine\.py:1: KeyError"),
        (
            "class A:\n  def __init__(self):\n    1 / 0\n",
            "A",
            r"mine\.py:3: ZeroDivisionError",
        ),
        (
            "class A:\n  def __init__(self, x): ...\n",
            "A",
            r"mine\.py: TypeError",
        ),
        (
            "def score(video): ...\n",
            "score",
            r"mine\.py: score",
        ),
        (
            "def score(v, p, x): ...\n",
            "score",
            "'x'",
        ),
    ],
)
def test_error_in_the_file_names_its_line(
    text: str, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as found:
        reward_of(tmp_path, text, name)
    assert str(found.value).startswith("rewards.mine")
    assert "\n" not in str(found.value)
    assert found.value.__cause__ is not None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine.py", r"file\.py:name"),
        ("mine.txt:score", r"file\.py:name"),
        ("gone.py:score", r"gone\.py"),
    ],
)
def test_wrong_target_raises_before_the_file_runs(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory_of("mine", RewardConfig(target=target))
    with pytest.raises(ValueError, match="shapes"):
        RewardConfig(kind="shapes", target=target)


def test_missing_attribute_and_wrong_type_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'socre'"):
        reward_of(tmp_path, "def socre(video, prompts): ...\n")
    with pytest.raises(ValueError, match="int"):
        reward_of(tmp_path, "score = 3\n")


def test_installed_package_offers_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(
        "bright", "alignment.rewards.brightness:Brightness", plugin.GROUP
    )
    monkeypatch.setattr(
        plugin, "entry_points", lambda group: [point] if group == plugin.GROUP else []
    )
    (reward,) = build_rewards({"bright": RewardConfig()}).values()
    assert reward.score(VIDEO, PROMPTS, fps=8.0).value_B.shape == (6,)
    with pytest.raises(ValueError, match="'bright'"):
        factory_of("brigth", RewardConfig())


class Rank:
    """A member's place in its group by brightness: says nothing about a video alone."""

    name = "rank"
    group_level = True

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def score(
        self, video_BTYXC: torch.Tensor, prompts: list[str], *, fps: float
    ) -> Score:
        self.seen.append(list(prompts))
        return Score(video_BTYXC.float().mean((1, 2, 3, 4)).argsort().argsort().float())


@pytest.mark.parametrize("overlap", [False, True])
def test_group_level_reward_gets_a_group_per_call(*, overlap: bool) -> None:
    rank = Rank()
    result = loop_of({"rank": rank}, overlap_scoring=overlap).step(0)
    assert rank.seen == [[prompt] * 4 for prompt in result.batch.prompts]
    places = result.scores["rank"].value_B.view(4, 4)
    assert places.sort(dim=1).values.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 4
    assert math.isclose(result.metrics["reward/rank"], 1.5)
    with pytest.raises(ValueError, match="ranks_per_group=2"):
        loop_of({"rank": rank}, ranks_per_group=2)


def test_reward_that_writes_into_the_videos_changes_nothing_for_others(
    tmp_path: Path,
) -> None:
    text = "def score(video, prompts):\n    video.zero_()\n    return [0.0] * len(prompts)\n"
    before = VIDEO.clone()
    reward_of(tmp_path, text).score(VIDEO, PROMPTS, fps=8.0)
    assert torch.equal(VIDEO, before)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ("{i: float(i) for i in range(6)}", "dict"),
        ("{1.0, 2.0, 3.0, 4.0, 5.0, 6.0}", "set"),
        ("frozenset(range(6))", "frozenset"),
        ("'123456'", "str"),
        ("b'123456'", "bytes"),
        ("{i: 0.0 for i in range(6)}.keys()", "dict_keys"),
    ],
)
def test_returned_object_without_order_is_refused(
    returned: str, kind: str, tmp_path: Path
) -> None:
    reward = reward_of(tmp_path, f"def score(video, prompts):\n    return {returned}\n")
    with pytest.raises(ValueError, match=kind):
        reward.score(VIDEO, PROMPTS, fps=8.0)


@pytest.mark.parametrize(
    "returned",
    [
        "Score(torch.zeros(6, dtype=torch.complex64))",
        "Score(torch.zeros(6).to_sparse())",
        "Score(torch.zeros(6, device='meta'))",
        "Score(torch.zeros(6), texts=[b'x'] * 6)",
        "Score(torch.zeros(6), texts=[object()] * 6)",
        "sys.exit(0)",
    ],
)
def test_strange_score_is_an_error_of_the_reward(returned: str, tmp_path: Path) -> None:
    text = (
        "import sys, torch\nfrom common.types import Score\n"
        f"def score(video, prompts):\n    return {returned}\n"
    )
    named = NamedReward("mine", reward_of(tmp_path, text))
    with pytest.raises(RewardFailedError, match=r"rewards\.mine"):
        named.score(VIDEO, PROMPTS, fps=8.0)


def test_reward_cannot_change_the_process(tmp_path: Path) -> None:
    text = (
        "import os, torch\nfrom common.types import Score\n"
        "def score(video, prompts):\n"
        "    os.chdir('/')\n"
        "    torch.set_grad_enabled(False)\n"
        "    return Score(torch.zeros(6, dtype=torch.float64), texts=['\\ud83d'] * 6)\n"
    )
    folder = Path.cwd()
    score = NamedReward("mine", reward_of(tmp_path, text)).score(
        VIDEO, PROMPTS, fps=8.0
    )
    assert Path.cwd() == folder
    assert torch.is_grad_enabled()
    assert score.value_B.dtype == torch.float32
    assert "".join(score.texts).isprintable()
    score.texts[0].encode()


def test_file_that_exits_is_an_error_of_the_reward(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards\.mine"):
        reward_of(tmp_path, "import sys\nsys.exit(0)\n")


@pytest.mark.parametrize(
    "raised",
    [
        "next(iter([]))",
        "raise asyncio.CancelledError",
        "raise GeneratorExit",
        "raise Odd('x')",
        "raise Mute",
    ],
)
def test_every_kind_of_exception_is_an_error_of_the_reward(
    raised: str, tmp_path: Path
) -> None:
    text = (
        "import asyncio\n"
        "class Odd(BaseException):\n    pass\n"
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
        f"def score(video, prompts):\n    {raised}\n"
    )
    named = NamedReward("mine", reward_of(tmp_path, text))
    with pytest.raises(RewardFailedError, match=r"rewards\.mine"):
        named.score(VIDEO, PROMPTS, fps=8.0)


@pytest.mark.parametrize("name", ["3", "'a\\nb'", "''", "'\\ud83d'"])
def test_part_whose_name_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    text = (
        "import torch\nfrom common.types import Score\n"
        "def score(video, prompts):\n"
        f"    return Score(torch.zeros(6), parts={{{name}: torch.zeros(6)}})\n"
    )
    with pytest.raises(ValueError, match="part"):
        contained_score(reward_of(tmp_path, text), VIDEO, PROMPTS, fps=8.0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_dtype_and_device_of_torch_are_restored(
    device: str, tmp_path: Path
) -> None:
    text = (
        "import torch\n"
        "def score(video, prompts):\n"
        "    torch.set_default_dtype(torch.float64)\n"
        f"    torch.set_default_device('{device}')\n"
        "    return [0.0] * 6\n"
    )
    reward = reward_of(tmp_path, text)
    if device == "meta":
        # its scores are on the meta device, without data
        with pytest.raises(ValueError, match="meta"):
            contained_score(reward, VIDEO, PROMPTS, fps=8.0)
    else:
        contained_score(reward, VIDEO, PROMPTS, fps=8.0)
    # a default device is a mode, and torch.compile cannot trace a model under it
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
