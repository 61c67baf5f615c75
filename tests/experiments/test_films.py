"""The picture of the demo's films: every film stands in its place, and a short one waits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.files import append_line
from experiments.films import FILM, GAP, HEAD, MARGIN, CaptionedFilm, draw, read_arm
from tests.documented import ROOT

RED = (255, 0, 0)
BLUE = (0, 0, 255)


def film(*colors: tuple[int, int, int]) -> CaptionedFilm:
    frames = [np.full((4, 4, 3), color, dtype=np.uint8) for color in colors]
    return CaptionedFilm(np.stack(frames), "0.50")


def test_films_stand_in_their_row_and_column() -> None:
    arms = [("base", [film(RED, BLUE)]), ("tuned", [film(BLUE)])]
    first, second = draw(["a red square"], arms)
    middle = MARGIN + FILM // 2
    top = HEAD + FILM // 2
    assert first.getpixel((middle, top)) == RED
    assert second.getpixel((middle, top)) == BLUE
    # The second row lies below the first, its caption and a gap; it ended and stays.
    below = first.height - GAP - FILM // 2
    assert first.getpixel((middle, below)) == BLUE
    assert second.getpixel((middle, below)) == BLUE


def test_too_few_kept_films_are_an_error(tmp_path: Path) -> None:
    append_line(tmp_path / "results.jsonl", '{"index": 0, "video": null}')
    with pytest.raises(ValueError, match="0 films were kept, 6 are wanted"):
        read_arm(tmp_path, 6)


def test_readme_shows_a_small_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = ROOT / "docs/films/demo.webp"
    assert path.relative_to(ROOT).as_posix() in text
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as picture:
        assert picture.n_frames > 1
