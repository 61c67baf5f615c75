"""Every example runs, with the smallest settings that show something."""

from __future__ import annotations

import ast
import csv
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards
from common.film import Film
from common.log import read_metrics
from common.types import Generator
from rm.config import Generation
from rm.model import DeScore
from tests.examples.conftest import EXAMPLES, ROOT
from tests.launch.processes import run
from tests.style import docstring_lines
from tests.tiny_qwen import SETTINGS, TEMPLATE, tiny_qwen, tiny_tokenizer
from toy.oracle import ShapesOracle

Loader = Callable[[str], ModuleType]
MOST_LINES = 70


SHORT = sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "make_notebook.py"})


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_example_is_short(path: Path) -> None:
    """Lines of code: without blank lines, comments and docstrings.

    own_generator.py holds what the loop asks for, and what the command asks for besides.
    """
    text = path.read_text(encoding="utf-8")
    documented = docstring_lines(ast.parse(text))
    lines = [
        line
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
        and not line.strip().startswith("#")
        and number not in documented
    ]
    most = 90 if path.name == "own_generator.py" else MOST_LINES
    assert len(lines) <= most


def test_every_example_is_on_its_page_and_in_a_test() -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    tests = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")
    )
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"examples/{path.name}" in page
            assert path.stem in tests


def test_clips_show_their_captions(example: Loader, tmp_path: Path) -> None:
    """The oracle measures that the winner of every row shows the caption better."""
    table = example("make_clips").make_clips(tmp_path, rows=4)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["winner"] for row in rows] == ["first", "second"] * 2
    for row in rows:
        other = {"first": "second", "second": "first"}[row["winner"]]
        values = []
        for side in (row["winner"], other):
            film = Film(tmp_path / row[side])
            video = film.frames(range(film.count))[None]
            score = ShapesOracle().score(video, [row["caption"]], fps=8.0)
            values.append(float(score.value_B))
        assert values[0] > values[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random DeScore of the tiny Qwen3-VL."""
    writing = Generation(max_new_tokens=40, temperature=2.0, repetition_penalty=1.0)
    folder = tmp_path / "descore"
    model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264, writing)
    model.save(folder)
    return folder


def test_score_videos_prints_the_best_first(
    example: Loader,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example("make_clips").make_clips(tmp_path, rows=2)
    videos = sorted(tmp_path.glob("*.mp4"))
    score = example("score_videos").score_videos(checkpoint, videos, "a red circle")
    lines = capsys.readouterr().out.splitlines()
    printed = [line.split()[1] for line in lines if line.endswith(".mp4")]
    values = dict(zip(map(str, videos), score.value_B.tolist(), strict=True))
    assert set(printed) == set(values)
    finite = [values[name] for name in printed if math.isfinite(values[name])]
    assert finite == sorted(finite, reverse=True)


def test_readme_quick_start_prints_scores_and_a_chain_of_thought(
    example: Loader,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The block of README.md as it stands, but for the paths of its files."""
    example("make_clips").make_clips(tmp_path, rows=1)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.partition("## From Python")[2]
    code = code.partition("```python\n")[2].partition("```")[0]
    first, second = sorted(tmp_path.glob("*.mp4"))
    paths = {
        "runs/demo/descore/final": checkpoint,
        "a.mp4": first,
        "b.mp4": second,
    }
    for name, path in paths.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    program = tmp_path / "quick_start.py"
    program.write_text(code)
    runpy.run_path(str(program))
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([")
    assert len(printed.splitlines()) >= 2


def test_my_reward_is_what_a_hand_computes(example: Loader) -> None:
    """Red then black: red is 0.5 on average; brightness falls by 1/3 in a frame of 1/3 second."""
    video = torch.zeros(2, 2, 1, 1, 3, dtype=torch.uint8)
    video[0, 0, ..., 0] = 255
    video[1, :, ..., 2] = 51
    score = example("my_reward").score
    assert score(video, ["", ""], fps=3.0).tolist() == pytest.approx([0.5, -0.2])
    calm = score(video, ["", ""], fps=3.0, calm=0.25).tolist()
    assert calm == pytest.approx([0.25, -0.2])


def grey(*levels: int) -> torch.Tensor:
    """Videos of two frames and one pixel, each of one brightness."""
    level_B = torch.tensor(levels, dtype=torch.uint8)
    return level_B.view(-1, 1, 1, 1, 1).repeat(1, 2, 1, 1, 3)


def test_pairwise_reward_is_the_share_of_won_comparisons(example: Loader) -> None:
    """Of 0, 10, 11 and 60, each against three others: wins 0, 1, 2, 3; within 2/255 ties."""
    WinRate = example("pairwise_reward").WinRate
    video = grey(0, 10, 11, 60)
    rates = WinRate().score(video, [""] * 4).tolist()
    assert rates == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    tied = WinRate(margin=2 / 255).score(video, [""] * 4).tolist()
    assert tied == pytest.approx([0.0, 0.5, 0.5, 1.0])
    # nobody to be compared with
    assert WinRate().score(grey(7), [""]).isnan().all()


def test_pairwise_reward_of_a_judge_that_likes_the_first_is_a_tie(
    example: Loader,
) -> None:
    class LikesFirst(example("pairwise_reward").WinRate):
        def prefers(self, *_: object) -> float:
            return 1.0

    assert LikesFirst().score(grey(0, 10, 60), [""] * 3).tolist() == [0.5] * 3


def test_pairwise_reward_gets_whole_groups_from_the_loop(example: Loader) -> None:
    """By its config: exactly the members of a group a call, however many a call may hold."""
    path = EXAMPLES / "pairwise_reward.py"
    cfg = RewardConfig(target=f"{path}:WinRate", options={"margin": 0.01})
    reward = build_rewards({"wins": cfg})["wins"]
    assert reward.group_level
    score = reward.score(grey(0, 2, 60), [""] * 3, fps=8.0)
    assert score.value_B.tolist() == pytest.approx([0.25, 0.25, 1.0])


@pytest.mark.slow
def test_my_reward_trains_in_the_command(tmp_path: Path) -> None:
    run(
        sys.executable,
        "launch/grpo.py",
        "--config",
        "configs/shapes/grpo_oracle.yaml",
        f"run_dir={tmp_path}",
        "rewards.oracle=null",
        "rewards.warm.target=examples/my_reward.py:score",
        "rewards.warm.options.calm=0.5",
        "steps=1",
        "prompts_per_step=2",
        "grpo.group_size=2",
        "evaluation=null",
        "self_checks=false",
    )
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isfinite(row["reward/warm"])
    assert row["train/skipped"] == 0


@pytest.mark.slow
def test_train_descore_reads_a_foreign_table(example: Loader, tmp_path: Path) -> None:
    table = example("make_clips").make_clips(tmp_path / "clips", rows=2)
    accuracy = example("train_descore").train(
        table,
        "assets/shapes/qwen",
        tmp_path / "run",
        "cold_start.pairs_per_step=2",
        "cold_start.micro_batch=2",
        "cold_start.epochs=1",
    )
    assert accuracy in (0.0, 0.5, 1.0)
    with (tmp_path / "clips/pairs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["videos"] == "['001a.mp4', '001b.mp4']"
    assert [row["GSB"] for row in rows] == ["A", "B"]
    assert (tmp_path / "run/final/descore.json").is_file()


def test_grpo_loop_raises_its_reward(example: Loader) -> None:
    """At first the tint is 0 and red is as frequent as blue, so the reward is near 0."""
    means = example("grpo_loop").train(steps=12)
    assert abs(means[0]) < 0.05
    assert means[-1] > means[0] + 0.2


def test_own_generator_is_a_generator_of_the_loop(example: Loader) -> None:
    """Before any update policy and reference are one, and the ratio of a replay is 1."""
    from alignment.self_checks import first_ratio

    generator = example("own_generator").TintGenerator()
    needed = {"module", "rollout", "transition", "decode", "reference"}
    assert needed < set(dir(Generator)) | {"module"}
    assert needed <= set(dir(generator))
    assert first_ratio(generator, "a red room", dtype="float32").ok
    torch.nn.init.ones_(generator.module.bias)
    (group,) = generator.rollout(["x"], group_size=2, seeds=[0])
    step = group.steps[0]
    policy = generator.transition("x", step)
    with generator.reference(), torch.no_grad():
        reference = generator.transition("x", step)
    # v + 1 moves the mean by -delta (1 + s^2 (1 - sigma) / (2 sigma)), and std^2 = s^2 delta
    delta = step.sigma - step.sigma_next
    moved = -delta - policy.std**2 * (1 - step.sigma) / (2 * step.sigma)
    difference = (policy.mean - reference.mean).detach()
    assert torch.allclose(difference, torch.full_like(difference, moved), atol=1e-5)


def test_own_generator_walks_to_pixels_of_its_spread(example: Loader) -> None:
    """The exact flow from N(0, 1) to N(0, 1 / 4) halves every number, and so do 500 Euler steps."""
    module = example("own_generator")
    sigmas = module.sigma_grid(500, shift=3.0).tolist()
    with torch.no_grad():
        clean = module.TintGenerator().denoise(torch.ones(1, *module.SHAPE), sigmas)
    torch.testing.assert_close(clean, torch.full_like(clean, 0.5), atol=5e-3, rtol=0)


def test_own_generator_saves_what_it_loads(example: Loader, tmp_path: Path) -> None:
    kind = example("own_generator").TintGenerator
    trained = kind()
    torch.nn.init.constant_(trained.module.bias, 0.25)
    trained.save_trained(tmp_path, trained.module.state_dict())
    other = kind()
    other.load_trained(tmp_path)
    assert other.module.bias.tolist() == [0.25] * 3
    video = other.decode(other.sample(["x"], [3]))
    assert (video.shape, video.dtype) == ((1, 4, 8, 8, 3), torch.uint8)


@pytest.mark.slow
def test_pairs_and_dpo_start_at_the_logarithm_of_two(
    example: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first update policy and reference are one, so the loss is ln 2."""
    metrics = example("pairs_and_dpo").train(tmp_path, prompts=4, candidates=2)
    assert math.isfinite(metrics["train/loss"])
    out = capsys.readouterr().out
    assert "step   0  loss 0.6931" in out
