"""Draw the films of a demo before and after training: `python experiments/films.py`.

A row of the picture is an arm (the base generator, Longcat-GRPO, Flow-DPO), a column a held-out
prompt: the first that the demo kept, not chosen by hand. Noise and prompt of a column are the same.
Under every film stands the utility that people see in it. The result is an animated WebP.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments import tables
from experiments.runner import ROOT

# Title and folder of an arm.
ARMS = (
    ("base", "eval_base"),
    ("Longcat-GRPO", "eval_tuned"),
    ("Flow-DPO", "eval_dpo"),
)
# The reward whose value stands under a film.
JUDGE = "people"
# Sizes in pixels.
FILM = 112
GAP = 8
MARGIN = 96
HEAD = 88
CAPTION = 16
TEXT = 11
# Half of the true rate, so that one sees what moves.
FRAME_MS = 250
WHITE = (255, 255, 255)
BLACK = (20, 20, 20)
GREY = (110, 110, 110)


@dataclass(frozen=True)
class CaptionedFilm:
    """A film of the picture: frames (T, Y, X, 3) and what stands under it."""

    frames_TYXC: np.ndarray
    caption: str


def read_arm(folder: Path, count: int) -> list[dict[str, Any]]:
    """Read the rows of the first films that an evaluation kept."""
    rows = [row for row in tables.read_results(folder) if row["video"] is not None]
    if len(rows) < count:
        raise ValueError(f"{folder}: {len(rows)} films were kept, {count} are wanted")
    return rows[:count]


def read_film(folder: Path, row: dict[str, Any]) -> CaptionedFilm:
    """Read the frames of a row and its caption."""
    from common.film import Film

    film = Film(folder / row["video"])
    frames = film.frames(range(film.count)).numpy()
    return CaptionedFilm(frames, f"{row['rewards'][JUDGE]:.2f}")


def draw(
    prompts: Sequence[str],
    arms: Sequence[tuple[str, Sequence[CaptionedFilm]]],
) -> list[Image.Image]:
    """Draw the frames of the picture."""
    # The page without its films.
    columns = len(prompts)
    width = MARGIN + columns * (FILM + GAP)
    height = HEAD + len(arms) * (FILM + CAPTION + GAP)
    page = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(TEXT)
    for column, prompt in enumerate(prompts):
        text = textwrap.fill(prompt, 18)
        pen.text((_left(column), 4), text, BLACK, font=font)
    for line, (title, films) in enumerate(arms):
        top = _top(line)
        pen.text((4, top + FILM // 2 - TEXT), title, BLACK, font=font)
        for column, film in enumerate(films):
            place = (_left(column), top + FILM + 1)
            pen.text(place, film.caption, GREY, font=font)

    # A copy of the page for each frame.
    length = max(len(film.frames_TYXC) for _, films in arms for film in films)
    frames = []
    for time in range(length):
        frame = page.copy()
        for line, (_, films) in enumerate(arms):
            # A film that has ended shows its last frame.
            for column, film in enumerate(films):
                last = len(film.frames_TYXC) - 1
                pixels = Image.fromarray(film.frames_TYXC[min(time, last)])
                large = pixels.resize((FILM, FILM), Image.Resampling.NEAREST)
                frame.paste(large, (_left(column), _top(line)))
        frames.append(frame)
    return frames


def _left(column: int) -> int:
    return MARGIN + column * (FILM + GAP)


def _top(line: int) -> int:
    return HEAD + line * (FILM + CAPTION + GAP)


def main() -> None:
    """Read the demo's films, draw the picture and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/films/demo.webp"))
    parser.add_argument("--count", type=int, default=6, help="prompts")
    args = parser.parse_args()

    # The arms have the same prompts in the same order.
    prompts: list[str] = []
    arms = []
    for title, name in ARMS:
        folder = ROOT / args.run_dir / name
        rows = read_arm(folder, args.count)
        prompts = [row["prompt"] for row in rows]
        arms.append((title, [read_film(folder, row) for row in rows]))

    # Write the picture, which repeats without end.
    frames = draw(prompts, arms)
    out = ROOT / args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        out,
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MS,
        loop=0,
        quality=80,
        method=6,
    )
    print(f"{args.out}: {out.stat().st_size / 1024:.0f} kB, {len(frames)} frames")


if __name__ == "__main__":
    main()
