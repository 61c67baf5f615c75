"""The embedded world: the oracle must agree with the renderer's truth, which it never sees."""

from __future__ import annotations

import random
from dataclasses import replace

import av
import pytest
import torch
import torch.nn.functional as F

from common.video_io import write_mp4
from toy.measure import compare, measure, observe
from toy.world import (
    FPS,
    SUB_DIMENSIONS,
    VALUES,
    Attributes,
    Scene,
    all_attributes,
    caption,
    parse,
    random_attributes,
    random_scene,
    render,
    split_attributes,
)

RED = Attributes("red", "circle", "right", "fixed", "dark", "vivid")


def scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(random_attributes(rng), rng) for _ in range(count)]


def disagreements(drawn: list[Scene], videos: torch.Tensor) -> int:
    return sum(
        observe(video).attributes != scene.attributes
        for scene, video in zip(drawn, videos, strict=True)
    )


def test_world_has_documented_size() -> None:
    combinations = all_attributes()
    assert len(set(combinations)) == 6 * 3 * 4 * 2 * 3 * 2
    train, heldout = split_attributes()
    assert len(heldout) == 173  # 20 % of 864, rounded
    assert not set(train) & set(heldout)
    assert split_attributes() == (train, heldout)


def test_oracle_agrees_with_the_renderer_on_a_thousand_videos() -> None:
    drawn = scenes(1000, seed=1)
    assert disagreements(drawn, render(drawn)) <= 10


@pytest.mark.parametrize("side", [48, 64])
def test_oracle_does_not_depend_on_resolution(side: int) -> None:
    drawn = scenes(60, seed=2)
    assert disagreements(drawn, render(drawn, side=side)) == 0


def test_oracle_survives_blur_and_noise() -> None:
    drawn = scenes(200, seed=3)
    flat = render(drawn).float().permute(0, 1, 4, 2, 3).reshape(-1, 3, 32, 32)
    noise = 10 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(flat + noise, 3, 1, 1, count_include_pad=False)
    videos = (
        blurred.reshape(200, -1, 3, 32, 32)
        .permute(0, 1, 3, 4, 2)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
    assert disagreements(drawn, videos) <= 2


@pytest.mark.parametrize("crf", [12, 23])  # ours, and what the web uses
def test_oracle_survives_mp4(tmp_path, crf: int) -> None:
    drawn = scenes(60, seed=4)
    decoded = []
    for i, video in enumerate(render(drawn)):
        write_mp4(tmp_path / f"{i}.mp4", video, FPS, crf=crf)
        with av.open(str(tmp_path / f"{i}.mp4")) as container:
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
        decoded.append(torch.stack(frames))
    assert disagreements(drawn, torch.stack(decoded)) <= 1


def test_every_wording_can_be_read_back() -> None:
    for attributes in all_attributes():
        for wording in range(4):
            assert parse(caption(attributes, wording=wording)) == attributes
    assert len({caption(RED, wording=w) for w in range(4)}) == 4


def test_parse_leaves_unnamed_attributes_open() -> None:
    assert parse("A Red thing.") == Attributes("red", None, None, None, None, None)
    assert parse("red or blue?").color is None  # undecided is not a wish


@pytest.mark.parametrize(
    ("change", "scores"),
    [
        ({}, (2, 2, 2, 2, 2)),
        ({"color": "blue"}, (1, 2, 2, 2, 2)),
        ({"color": "blue", "shape": "square"}, (0, 2, 2, 2, 2)),
        ({"motion": "left"}, (2, 1, 2, 2, 2)),
        ({"motion": "up"}, (2, 0, 2, 2, 2)),
        ({"motion": None}, (2, 0, 2, 2, 2)),
        ({"camera": "panning"}, (2, 2, 0, 2, 2)),
        ({"camera": None}, (2, 2, 1, 2, 2)),
        ({"background": "grey"}, (2, 2, 2, 1, 2)),
        ({"background": "bright"}, (2, 2, 2, 0, 2)),
        ({"style": "pastel"}, (2, 2, 2, 2, 0)),
        (
            {"color": None, "shape": None, "motion": None, "style": None},
            (0, 0, 2, 2, 0),
        ),
        ({"camera": None, "background": None}, (2, 2, 0, 0, 2)),
    ],
)
def test_scores_by_hand(change: dict[str, str | None], scores: tuple[int, ...]) -> None:
    verdict = compare(RED, replace(RED, **change))
    assert tuple(verdict.scores[name] for name in SUB_DIMENSIONS) == scores
    assert verdict.total == pytest.approx(sum(scores) / 10)


def test_open_attribute_is_always_satisfied() -> None:
    open_wish = Attributes("red", None, None, None, None, None)
    assert (
        compare(
            open_wish, replace(RED, shape="square", motion="up", style="pastel")
        ).total
        == 1.0
    )


def test_measured_speed_is_the_rendered_one() -> None:
    rng = random.Random(5)
    for motion, sign in (("right", 1), ("left", -1), ("down", 1), ("up", -1)):
        scene = random_scene(replace(RED, motion=motion), rng)
        seen = observe(render([scene])[0]).shape
        speed = seen.speed_x if motion in ("left", "right") else seen.speed_y
        assert speed == pytest.approx(sign * scene.travel, rel=0.02)


def test_measured_slide_is_the_rendered_one() -> None:
    scene = random_scene(replace(RED, camera="panning"), random.Random(6))
    assert observe(render([scene])[0]).room.slide == pytest.approx(scene.pan, rel=0.03)


@pytest.mark.parametrize(
    "kind", ["black", "grey", "white", "noise", "flicker", "coloured"]
)
def test_blank_and_noisy_videos_score_low(kind: str) -> None:
    draw = torch.Generator().manual_seed(7)
    levels = {"black": 0, "grey": 120, "white": 255}
    if kind in levels:
        video = torch.full((9, 32, 32, 3), levels[kind], dtype=torch.uint8)
    elif kind == "noise":
        video = torch.randint(0, 256, (9, 32, 32, 3), generator=draw, dtype=torch.uint8)
    elif kind == "flicker":
        video = torch.randint(
            0, 256, (9, 1, 1, 3), generator=draw, dtype=torch.uint8
        ).expand(9, 32, 32, 3)
    else:
        video = torch.tensor([235, 25, 25], dtype=torch.uint8).expand(9, 32, 32, 3)
    prompts = [
        caption(a, wording=0) for a in random.Random(8).sample(all_attributes(), 50)
    ]
    assert max(measure(video, prompt).total for prompt in prompts) <= 0.2


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="uint8"):
        observe(torch.zeros(9, 32, 32, 3))
    with pytest.raises(ValueError, match="cat"):
        measure(render(scenes(1, 0))[0], "a cat on a mat")


def test_values_cover_the_attributes() -> None:
    assert list(VALUES) == list(vars(RED))
