"""Write preference data of the embedded world: mp4 files and the CSV columns that users have.

`python toy/make_pairs.py --out runs/data` writes ``train.csv`` and ``heldout.csv`` (disjoint
combinations of attributes) with ``videos/``, and the videos that people like best of each, as
``train_best.csv``; ``--pairs`` names other `SPLITS`. The two videos of a
pair come from the renderer, with some attributes changed, or from the tiny Wan, with or without
spoilt latents: the kinds of videos that a reward model will meet. The people of `toy.people` label
them by a utility that the table tells nobody who trains, and the base Qwen3-VL writes the chains of
thought. The data is a pure function of the seed; the number of workers and the other splits change
no byte.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from generator.wan import WanGenerator
    from rm.model import DeScore
    from rm.video import PreparedVideo
    from toy.world import Attributes

SOURCES = ("render", "render", "render", "wan", "wan", "wan", "wan", "spoilt")
# The words of an answer for a label.
PREFERENCES = {
    "A": "Video 1 is better",
    "B": "Video 2 is better",
    "same": "same",
}
# Pairs per task of a worker.
CHUNK = 16
# Videos of a split that people like best, in a table of their own.
BEST = 64
# The generator of the videos, and the Qwen3-VL that writes the chains of thought.
SAMPLE_CONFIG = Path("configs/shapes/sample.yaml")
BASE_MODEL = Path("assets/shapes/qwen")


@dataclass(frozen=True)
class Split:
    """Where the pairs of a table come from.

    sources    Sources of a pair's two videos, drawn with equal odds.
    shares     Shares of attributes that a render redraws by chance; each video draws one of them.
    look       Fields of `toy.world.Look` for renders; {} is what the base models have seen.
    wear       Share of renders with each fault of `worn`: blur, grain, flicker, pumping.
    accidents  Share of videos that stand still (half of them), have lost their colour or are
               noise.
    heldout    Use combinations of attributes that no training split has.
    annotated  The table holds the annotator's scores, a fifth of them wrong, instead of the
               oracle's, with which a test is evaluated.
    """

    sources: tuple[str, ...] = SOURCES
    shares: tuple[float, ...] = (0.0, 0.15, 0.3, 0.5)
    look: Mapping[str, Any] = field(default_factory=dict)
    wear: float = 0.4
    accidents: float = 0.1
    heldout: bool = False
    annotated: bool = False


# Good and bad alike: a reward model learns nothing about what it never saw.
ANYTHING: dict[str, Any] = {
    "sources": ("render",),
    "shares": (0.0, 0.25, 0.5, 0.75, 1.0),
    "accidents": 0.15,
}
# Smaller and slower than anything the base Qwen3-VL was trained to describe.
FILMED = ANYTHING | {
    "look": {
        "scale": (0.13, 0.165),
        "travel": (0.2, 0.3),
        "pan": (0.025, 0.045),
        "light": 20.0,
    },
}
# Sizes that no training of any model has.
OTHER_LOOK = {
    "scale": (0.235, 0.28),
    "travel": (0.12, 0.2),
    "pan": (0.055, 0.1),
    "light": 30.0,
}
# The demo trains on many looks, and is tested on shapes larger than any of its training.
MANY_LOOKS = {
    "scale": (0.15, 0.23),
    "travel": (0.2, 0.36),
    "pan": (0.03, 0.08),
    "light": 20.0,
}
LARGER = MANY_LOOKS | {"scale": (0.235, 0.25), "travel": (0.2, 0.3)}
SPLITS = {
    "train": Split(annotated=True, look=MANY_LOOKS, accidents=0.3),
    "heldout": Split(heldout=True, look=LARGER),
    # `make reproduce-rm` trains and tests in the first domain and tests in four others, each of
    # which differs from it in a single respect.
    "filmed": Split(**FILMED, annotated=True),
    "indomain": Split(**FILMED),
    "combinations": Split(**FILMED, heldout=True),
    "renderer": Split(**ANYTHING, look=OTHER_LOOK),
    "wan": Split(("wan",)),
    "spoilt": Split(("spoilt",)),
}


@dataclass(frozen=True)
class VideoJob:
    """``count`` consecutive pairs of a split.

    base            Folder of the Qwen3-VL that writes the chains of thought.
    quality_weight  What people weigh the quality by, see `toy.people`.
    """

    out: Path
    split: str
    start: int
    count: int
    seed: int
    base: Path = BASE_MODEL
    quality_weight: float = 0.5


@dataclass(frozen=True)
class Side:
    """A video of a pair before it is drawn: file, source, attributes, prompt, random stream."""

    name: str
    source: str
    wish: Attributes
    prompt: str
    rng: random.Random


@dataclass(frozen=True)
class Seen:
    """What is known of a video: the sub-dimension scores of its table, and what people see.

    parts    The terms of the utility.
    utility  What people draw their label from.
    """

    scores: Mapping[str, int]
    parts: Mapping[str, float]
    utility: float


@lru_cache(maxsize=3)
def load_generator(*overrides: str) -> WanGenerator:
    """Load the generator of `SAMPLE_CONFIG`, once in each worker."""
    from common.config import load
    from launch.compose import build_generator
    from launch.schemas.training import SampleRun

    words = ["out=unused", "prompts=unused", *overrides]
    return build_generator(load(SampleRun, SAMPLE_CONFIG, words).generator)


@lru_cache(maxsize=1)
def load_base_model(path: Path) -> DeScore:
    """Load a base Qwen3-VL with its template, once in each worker."""
    from rm.model import DeScore

    return DeScore.from_base(path).eval()


def make(job: VideoJob) -> list[dict[str, object]]:
    """Write the mp4 files of a job and return its CSV rows."""
    import torch

    from common.distributed import derive_seed
    from common.video_io import write_mp4
    from rm.video import prepare
    from toy.world import FPS

    torch.set_num_threads(1)
    sides = list_sides(job)
    videos = draw_videos(job, sides)
    seen = []
    for side, video in zip(sides, videos, strict=True):
        write_mp4(job.out / side.name, video, FPS)
        annotator = side.rng if SPLITS[job.split].annotated else None
        weight = job.quality_weight
        seen.append(see(video, side.prompt, annotator=annotator, quality_weight=weight))

    # The chains of thought are about the files, as a training run reads them.
    model = load_base_model(job.base)
    prepared = [prepare(job.out / side.name, model.settings) for side in sides]
    cots = write_cots(model, [side.prompt for side in sides], prepared)
    rows = []
    for a in range(0, len(sides), 2):
        pair = slice(a, a + 2)
        rng = random.Random(
            derive_seed(job.seed, job.split, job.start + a // 2, "label")
        )
        row = csv_row(sides[pair], seen[pair], cots[pair], rng)
        rows.append(row)
    return rows


def see(
    video_TYXC: Tensor,
    prompt: str,
    *,
    annotator: random.Random | None,
    quality_weight: float = VideoJob.quality_weight,
) -> Seen:
    """Look at a uint8 video as people do, and as an annotator or, without one, the oracle does."""
    from toy.annotator import annotate
    from toy.measure import measure
    from toy.people import utility, value_of

    scores = measure(video_TYXC, prompt).scores
    if annotator is not None:
        scores = annotate(scores, annotator)
    found = utility(video_TYXC, prompt)
    value = value_of(found.grades, found.parts["quality"], quality_weight)
    return Seen(scores, found.parts, value)


def list_sides(job: VideoJob) -> list[Side]:
    """Draw the prompts of a job; A and B of a pair share theirs and follow each other."""
    from common.distributed import derive_seed
    from toy.world import caption, split_attributes

    train, heldout = split_attributes()
    combinations = heldout if SPLITS[job.split].heldout else train
    sides = []
    for row in range(job.start, job.start + job.count):
        rng = random.Random(derive_seed(job.seed, job.split, row))
        wish = rng.choice(combinations)
        prompt = caption(wish, wording=rng.randrange(4))
        source = rng.choice(SPLITS[job.split].sources)
        for letter in "AB":
            name = f"videos/{job.split}_{row:05d}_{letter}.mp4"
            rng = random.Random(derive_seed(job.seed, job.split, row, letter))
            sides.append(Side(name, source, wish, prompt, rng))
    return sides


def draw_videos(job: VideoJob, sides: Sequence[Side]) -> Tensor:
    """Draw a video per side: uint8 (B, T, Y, X, 3)."""
    from toy.world import (
        Look,
        mix_attributes,
        random_attributes,
        random_scene,
        render,
    )

    split = SPLITS[job.split]
    # Renders, some attributes changed; the share of changes varies from video to video.
    look = Look(**split.look)
    scenes = []
    for side in sides:
        share = side.rng.choice(split.shares)
        other = random_attributes(side.rng)
        shown = mix_attributes(side.wish, other, side.rng, share=share)
        scenes.append(random_scene(shown, side.rng, look))
    videos = render(scenes)
    for i, side in enumerate(sides):
        if split.accidents:
            videos[i] = hurt(videos[i], split.accidents, side.rng)
        videos[i] = worn(videos[i], split.wear, side.rng)

    # Videos of the generator take the places of the other renders.
    sampled = [i for i, side in enumerate(sides) if side.source != "render"]
    if sampled:
        generator = load_generator()
        prompts = [sides[i].prompt for i in sampled]
        seeds = [sides[i].rng.getrandbits(62) for i in sampled]
        clean = generator.sample(prompts, seeds=seeds)
        for row, i in enumerate(sampled):
            if sides[i].source == "spoilt":
                clean[row] = spoilt(clean[row], sides[i].rng)
        decoded = generator.decode(clean)
        for row, i in enumerate(sampled):
            videos[i] = hurt(decoded[row], split.accidents, sides[i].rng)
    return videos


def hurt(video_TYXC: Tensor, share: float, rng: random.Random) -> Tensor:
    """With probability ``share`` return a still of the video, a grey copy, or noise.

    Half of them are stills: a generator that learns to stand still is the commonest accident.
    """
    import torch

    if rng.random() >= share:
        return video_TYXC
    kind = rng.choice(("still", "still", "grey", "noise"))
    if kind == "still":
        return video_TYXC[:1].expand_as(video_TYXC)
    if kind == "grey":
        return video_TYXC.float().mean(-1, keepdim=True).expand_as(video_TYXC).round()
    draw = torch.Generator().manual_seed(rng.getrandbits(62))
    return torch.randint(0, 256, video_TYXC.shape, generator=draw, dtype=torch.uint8)


def worn(video_TYXC: Tensor, share: float, rng: random.Random) -> Tensor:
    """Give a uint8 video the faults of its quality, each with probability ``share``.

    They change nothing that a prompt asks for: the picture is soft; it has grain, normal noise of
    luminance with a standard deviation up to 9 of 255; its light flickers by up to 12 from frame
    to frame; it pumps, every second frame being drawn up to 15 % larger.
    """
    import torch
    import torch.nn.functional as F

    frames = video_TYXC.float().permute(0, 3, 1, 2)
    draw = torch.Generator().manual_seed(rng.getrandbits(62))
    soft, grainy, flickers, pumps = (rng.random() < share for _ in range(4))
    if pumps:
        side = frames.shape[-1]
        larger = round(side * rng.uniform(1.06, 1.15))
        margin = (larger - side) // 2
        part = F.interpolate(frames[1::2], (larger, larger), mode="bilinear")
        inner = slice(margin, margin + side)
        frames[1::2] = part[:, :, inner, inner]
    if soft:
        for _ in range(rng.choice((1, 2))):
            frames = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    if flickers:
        size = rng.uniform(3.0, 12.0)
        light = torch.randn(len(frames), generator=draw)
        frames = frames + size * light[:, None, None, None]
    if grainy:
        noise = torch.randn(frames[:, :1].shape, generator=draw)
        frames = frames + rng.uniform(2.0, 9.0) * noise
    pixels = frames.round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


def spoilt(clean_CFHW: Tensor, rng: random.Random) -> Tensor:
    """Scale latents and add noise, as an optimizer does that exploits a reward model."""
    import torch

    draw = torch.Generator().manual_seed(rng.getrandbits(62))
    noise = torch.randn(clean_CFHW.shape, generator=draw)
    return rng.uniform(0.4, 1.8) * clean_CFHW + rng.uniform(0.0, 1.2) * noise


def write_cots(
    model: DeScore, prompts: Sequence[str], prepared: Sequence[PreparedVideo]
) -> list[str]:
    """Write greedy chains of thought about prepared videos."""
    from rm.config import Generation
    from rm.generate import generate

    encoded = []
    for prompt, video in zip(prompts, prepared, strict=True):
        encoded.append(model.encode(prompt, video))
    written = generate(
        model,
        model.batch(encoded, prepared, query=False),
        Generation(max_new_tokens=96, repetition_penalty=1.0),
    )
    return [model.tokenizer.decode(written.ids(row)) for row in range(len(prompts))]


def csv_row(
    sides: Sequence[Side],
    seen: Sequence[Seen],
    cots: Sequence[str],
    rng: random.Random,
) -> dict[str, object]:
    """Build the row of a pair; people draw its label from the two utilities."""
    from toy.people import PEOPLE
    from toy.world import FPS, FRAMES

    first, second = seen
    difference = first.utility - second.utility
    label = PEOPLE.label(difference, rng)
    # Stage 2 learns from the preference and from the sub-dimension scores of both videos.
    answer = {
        "gsb_result": PREFERENCES[label],
        "video_1_scores": first.scores,
        "video_2_scores": second.scores,
    }
    prompt = sides[0].prompt
    return {
        "videos": repr([side.name for side in sides]),
        "problem": f"<video>\nHow well does the video show: {prompt}?",
        "durations": repr([FRAMES / FPS] * 2),
        "prompt": prompt,
        "CoT_A": cots[0],
        "CoT_B": cots[1],
        "GSB": label,
        "answer": f"<answer>{json.dumps(answer)}</answer>",
        "utility_A": first.utility,
        "utility_B": second.utility,
        "seen_A": json.dumps(first.parts),
        "seen_B": json.dumps(second.parts),
        "source": sides[0].source,
    }


def split_size(word: str) -> tuple[str, int]:
    """Parse ``train=2000``."""
    name, _, count = word.partition("=")
    if name not in SPLITS or not count.isdecimal() or not int(count):
        raise argparse.ArgumentTypeError(
            f"{word!r} is not SPLIT=COUNT with SPLIT one of {', '.join(SPLITS)}"
        )
    return name, int(count)


def list_jobs(args: argparse.Namespace) -> list[VideoJob]:
    """Cut every split into jobs of at most `CHUNK` pairs."""
    jobs = []
    for split, count in args.pairs:
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            job = VideoJob(
                out=args.out,
                split=split,
                start=start,
                count=size,
                seed=args.seed,
                base=args.base,
                quality_weight=args.quality_weight,
            )
            jobs.append(job)
    return jobs


def main() -> None:
    """Make all pairs in parallel, then write a table per split and done.json."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for SPLIT.csv and SPLIT_best.csv of each split, videos/ and done.json",
    )
    parser.add_argument(
        "--pairs",
        type=split_size,
        nargs="+",
        default=[("train", 2000), ("heldout", 1000)],
        metavar="SPLIT=COUNT",
        help=f"tables and their numbers of pairs; the splits are {', '.join(SPLITS)}",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of all videos and labels"
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=BASE_MODEL,
        help="the Qwen3-VL that writes the chains of thought",
    )
    parser.add_argument(
        "--quality-weight",
        type=float,
        default=VideoJob.quality_weight,
        help="what people weigh the quality by, which no chain of thought states",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; they change no byte"
    )
    args = parser.parse_args()

    from tqdm import tqdm

    # Rows in the order of the jobs, whoever finishes first.
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    jobs = list_jobs(args)
    tables: dict[str, list[dict[str, object]]] = {split: [] for split, _ in args.pairs}
    with (
        ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(job.count for job in jobs), desc="pairs", unit="pair") as bar,
    ):
        for job, rows in zip(jobs, pool.map(make, jobs), strict=True):
            tables[job.split] += rows
            bar.update(job.count)

    # The tables, and how often each label was given.
    counts = {}
    for split, table in tables.items():
        write_csv(args.out / f"{split}.csv", table)
        write_csv(args.out / f"{split}_best.csv", best_videos(table))
        labels = Counter(row["GSB"] for row in table)
        counts[split] = {label: labels[label] for label in ("A", "B", "same")}
    text = json.dumps(counts, indent=1) + "\n"
    (args.out / "done.json").write_text(text, encoding="utf-8")
    print(json.dumps(counts))


def best_videos(table: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """List the `BEST` videos of greatest utility, for launch/check_rewards.py."""
    videos = []
    for row in table:
        names = ast.literal_eval(row["videos"])
        for name, letter in zip(names, "AB", strict=True):
            video = {"video": name, "prompt": row["prompt"]}
            videos.append(video | {"utility": row[f"utility_{letter}"]})
    videos.sort(key=lambda video: -video["utility"])
    return videos[:BEST]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with their keys as the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
