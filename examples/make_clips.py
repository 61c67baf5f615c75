"""Make clips and a table of comparisons to try the other examples with.

    python examples/make_clips.py --out runs/examples/clips

Writes mp4 files of the embedded world (moving coloured shapes) and my_table.csv with the columns
caption, first, second, winner. The first clip of a row shows its caption, the second another one,
and every other row is turned round. Bring your own clips and table instead.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from common.video_io import write_mp4
from toy import world

FPS = 8.0


def make_clips(out: Path, *, rows: int = 8) -> Path:
    """Write the clips and the table; return the table."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    table = []
    for i in range(rows):
        # Two scenes; the caption is of the first.
        scenes = world.random_scenes(2, rng)
        caption = world.caption(scenes[0].attributes, wording=0)
        clips = world.render(scenes)

        # The better clip comes first in even rows, second in odd rows.
        winner = "first"
        if i % 2 == 1:
            clips = clips.flip(0)
            winner = "second"
        first = f"{i:03d}a.mp4"
        second = f"{i:03d}b.mp4"
        write_mp4(out / first, clips[0], FPS)
        write_mp4(out / second, clips[1], FPS)
        table.append([caption, first, second, winner])

    path = out / "my_table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "first", "second", "winner"])
        writer.writerows(table)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples/clips"))
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    print(make_clips(options.out, rows=options.rows))
