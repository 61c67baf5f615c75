"""Let the people of the embedded world label a policy's videos, two of each prompt.

`python toy/label_pairs.py --samples FOLDER --model DESCORE --out new.csv` reads the videos that
`launch/sample.py seeds=2` wrote into a folder, and writes a table like `toy/make_pairs.py`: labels
that people draw from their utilities, an annotator's scores, and the chains of thought of a reward
model. `--also TABLE COUNT` adds the first pairs of an earlier table, so that a reward model which
goes on training on the new ones does not forget. A pure function of the files and the seed.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.distributed import derive_seed
from common.files import read_jsonl
from common.video_io import read_frames
from rm.video import prepare
from toy.make_pairs import (
    CHUNK,
    Side,
    csv_row,
    load_base_model,
    see,
    write_cots,
    write_csv,
)
from toy.world import FPS, FRAMES, SIDE, parse

# What a table calls videos of a policy.
SOURCE = "policy"


def label_samples(
    samples: Path, model: Path, folder: Path, seed: int
) -> Iterator[dict[str, object]]:
    """Yield a row of the table for every two videos of a prompt.

    ``folder`` is that of the table, which names its videos from there. Raises ValueError, naming
    the file, where a prompt does not have two videos in a row.
    """
    # Two videos of a prompt follow each other.
    rows = read_jsonl(samples / "samples.jsonl")
    if len(rows) % 2 or any(
        first["prompt"] != second["prompt"]
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ):
        raise ValueError(
            f"{samples}/samples.jsonl: want two videos of each prompt, sample with seeds=2"
        )
    # A batch at a time: the reward model writes about all of its videos together.
    judge = load_base_model(model)
    for start in range(0, len(rows), 2 * CHUNK):
        part = rows[start : start + 2 * CHUNK]

        # What people and the annotator see, and what the reward model writes.
        sides, seen, prepared = [], [], []
        for offset, row in enumerate(part):
            path = samples / row["file"]
            rng = random.Random(derive_seed(seed, SOURCE, start + offset))
            name = os.path.relpath(path, folder)
            sides.append(Side(name, SOURCE, parse(row["prompt"]), row["prompt"], rng))
            video = read_frames(
                path, num_frames=FRAMES, fps=FPS, height=SIDE, width=SIDE
            )
            seen.append(see(video, row["prompt"], annotator=rng))
            prepared.append(prepare(path, judge.settings))
        cots = write_cots(judge, [side.prompt for side in sides], prepared)

        # The rows of the table.
        for a in range(0, len(part), 2):
            pair = slice(a, a + 2)
            rng = random.Random(derive_seed(seed, SOURCE, start + a, "label"))
            yield csv_row(sides[pair], seen[pair], cots[pair], rng)


def earlier_rows(table: Path, count: int, folder: Path) -> list[dict[str, Any]]:
    """Read the first ``count`` rows of a table, its videos named from another folder."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    # The same files, seen from another folder.
    for row in rows:
        names = ast.literal_eval(row["videos"])
        paths = [table.parent / name for name in names]
        row["videos"] = repr([os.path.relpath(path, folder) for path in paths])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--samples", type=Path, required=True, help="folder of launch/sample.py"
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="DeScore, or Qwen3-VL, that writes the chains of thought",
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the labels")
    parser.add_argument(
        "--also",
        nargs=2,
        metavar=("TABLE", "COUNT"),
        help="an earlier table, and how many of its pairs are added",
    )
    args = parser.parse_args(argv)

    # The new pairs first.
    folder = args.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Any] = list(label_samples(args.samples, args.model, folder, args.seed))
    new = len(rows)
    if args.also is not None:
        table, count = args.also
        rows += earlier_rows(Path(table), int(count), folder)
    write_csv(args.out, rows)
    print(f"{new} new pairs and {len(rows) - new} earlier ones in {args.out}")


if __name__ == "__main__":
    main()
