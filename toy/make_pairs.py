"""Write preference data of the embedded world: mp4 files and the CSV columns that users have.

`python toy/make_pairs.py --out runs/data` writes ``train.csv`` and ``heldout.csv`` (disjoint combinations of
attributes) with ``videos/``; ``--pairs`` names other `SPLITS`. The two videos of a pair come from the renderer, some
attributes changed, or from the tiny Wan, as it is or spoilt, the videos a reward model will meet. The oracle labels
them as people would; the base Qwen3-VL writes the chains of thought. A pure function of the seed, whatever the number
of workers and the other splits.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from generator.wan import WanGenerator
    from rm.model import DeScore
    from toy.world import Attributes

COLUMNS = (
    "videos", "problem", "durations", "prompt", "CoT_A", "CoT_B", "GSB", "answer", "oracle_A", "oracle_B", "sources"
)  # fmt: skip
SOURCES = ("render", "render", "wan", "wan", "wan", "wan", "wan", "spoilt")
CHUNK = 16  # pairs per task of a worker


@dataclass(frozen=True)
class Split:
    """Where the pairs of a table come from.

    sources    of a video, drawn with equal odds
    shares     of attributes that a render redraws, by chance; a video draws one of them
    look       fields of `toy.world.Look` for renders; {} is what the base models have seen
    grain      greatest standard deviation of film grain on renders, of 255; each video draws its own
    accidents  share of renders that stand still or have lost their colour
    heldout    combinations of attributes that no training split holds
    """

    sources: tuple[str, ...] = SOURCES
    shares: tuple[float, ...] = (0.0, 0.15, 0.3, 0.5)
    look: Mapping[str, Any] = field(default_factory=dict)
    grain: float = 0.0
    accidents: float = 0.0
    heldout: bool = False


# good and bad alike, a reward learns nothing about what it never saw; smaller, slower and grainier than anything the
# base Qwen3-VL was trained to describe
ANYTHING: dict[str, Any] = {
    "sources": ("render",),
    "shares": (0.0, 0.25, 0.5, 0.75, 1.0),
    "accidents": 0.15,
}
FILMED = ANYTHING | {
    "look": {"scale": (0.13, 0.18), "travel": (0.2, 0.3), "pan": (0.025, 0.045), "light": 20.0}, "grain": 8.0
}  # fmt: skip
OTHER_LOOK = {
    "scale": (0.22, 0.28),
    "travel": (0.12, 0.2),
    "pan": (0.055, 0.1),
    "light": 30.0,
}
SPLITS = {
    "train": Split(),
    "heldout": Split(heldout=True),
    # for `make reproduce-rm`: one domain to train on and be tested in, and four that differ from it in one thing each
    "filmed": Split(**FILMED),
    "indomain": Split(**FILMED),
    "combinations": Split(**FILMED, heldout=True),
    "renderer": Split(**ANYTHING, look=OTHER_LOOK, grain=12.0),
    "wan": Split(("wan",)),
    "spoilt": Split(("spoilt",)),
}


@dataclass(frozen=True)
class Draws:
    """uint8 videos (B, T, Y, X, 3) and where each came from."""

    video_BTYXC: Tensor
    sources: list[str]


@dataclass(frozen=True)
class VideoJob:
    """``count`` consecutive pairs of one split."""

    out: Path
    split: str
    start: int
    count: int
    seed: int
    config: Path
    judge: Path


def changed(
    attributes: Attributes, rng: random.Random, shares: Sequence[float]
) -> Attributes:
    """The same with each attribute redrawn with a probability that itself varies from video to video."""
    from toy.world import VALUES, random_attributes

    share = rng.choice(shares)
    other = random_attributes(rng)
    return type(attributes)(
        **{k: getattr(other if rng.random() < share else attributes, k) for k in VALUES}
    )


@lru_cache(maxsize=1)
def generator_of(config: Path) -> WanGenerator:
    """The generator that a `launch/sample.py` config names; loaded once in each worker."""
    from common.config import load
    from launch.compose import build_generator
    from launch.schemas.training import SampleRun

    return build_generator(
        load(SampleRun, config, ["out=unused", "prompts=unused"]).generator
    )


@lru_cache(maxsize=1)
def judge_of(path: Path) -> DeScore:
    """The base Qwen3-VL with its template; loaded once in each worker."""
    from rm.model import DeScore

    return DeScore.from_base(path).eval()


def draw(
    job: VideoJob,
    wishes: list[Attributes],
    prompts: list[str],
    sides: list[random.Random],
) -> Draws:
    """One video per side."""
    import torch

    from toy.world import Look, random_scene, render

    split = SPLITS[job.split]
    sources, look = [rng.choice(split.sources) for rng in sides], Look(**split.look)
    both = list(zip(wishes, sides, strict=True))
    videos = render(
        [
            random_scene(changed(wish, rng, split.shares), rng, look)
            for wish, rng in both
        ]
    )
    if split.accidents:
        videos = torch.stack(
            [
                hurt(video, split.accidents, rng)
                for video, rng in zip(videos, sides, strict=True)
            ]
        )
    if split.grain:
        videos = torch.stack(
            [
                grainy(video, split.grain, rng)
                for video, rng in zip(videos, sides, strict=True)
            ]
        )
    sampled = [i for i, source in enumerate(sources) if source != "render"]
    if sampled:
        generator = generator_of(job.config)
        clean = generator.sample(
            [prompts[i] for i in sampled],
            seeds=[sides[i].getrandbits(62) for i in sampled],
        )
        for row, i in enumerate(sampled):
            if sources[i] == "spoilt":
                clean[row] = spoilt(clean[row], sides[i])
        videos[torch.tensor(sampled)] = generator.decode(clean)
    return Draws(videos, sources)


def hurt(video_TYXC: Tensor, share: float, rng: random.Random) -> Tensor:
    """The video, or with probability ``share`` a still of it, or a grey copy in which no shape can be told."""
    if rng.random() >= share:
        return video_TYXC
    if rng.random() < 0.5:
        return video_TYXC[:1].expand_as(video_TYXC)
    return (
        video_TYXC.float()
        .mean(-1, keepdim=True)
        .round()
        .to(video_TYXC.dtype)
        .expand_as(video_TYXC)
    )


def grainy(video_TYXC: Tensor, most: float, rng: random.Random) -> Tensor:
    """Film grain: normal noise of luminance alone, of a standard deviation up to ``most``."""
    import torch

    draw = torch.Generator().manual_seed(rng.getrandbits(62))
    noise = rng.uniform(0.0, most) * torch.randn(
        (*video_TYXC.shape[:-1], 1), generator=draw
    )
    return (video_TYXC.float() + noise).round().clamp(0, 255).to(torch.uint8)


def spoilt(clean_CFHW: Tensor, rng: random.Random) -> Tensor:
    """Latents off the generator's path, scaled and noisy: where an optimizer goes that nobody told they are bad."""
    import torch

    draw = torch.Generator().manual_seed(rng.getrandbits(62))
    noise = torch.randn(clean_CFHW.shape, generator=draw)
    return rng.uniform(0.4, 1.8) * clean_CFHW + rng.uniform(0.0, 1.2) * noise


def think(judge: Path, prompts: list[str], paths: list[Path]) -> list[str]:
    """Chains of thought of the base Qwen3-VL about the files, greedy."""
    from rm.config import Generation
    from rm.generate import generate
    from rm.video import prepare

    model = judge_of(judge)
    prepared = [prepare(path, model.settings) for path in paths]
    encoded = [
        model.encode(prompt, video)
        for prompt, video in zip(prompts, prepared, strict=True)
    ]
    chains = generate(
        model,
        model.batch(encoded, prepared, query=False),
        Generation(max_new_tokens=96, repetition_penalty=1.0),
    )
    return [model.tokenizer.decode(chains.ids(row)) for row in range(len(paths))]


def answer(label: str, scores_A: Mapping[str, int], scores_B: Mapping[str, int]) -> str:
    """What stage 2 is told: the preference, and the right sub-dimension scores of both videos."""
    named = {"A": "Video 1 is better", "B": "Video 2 is better", "same": "same"}
    truth = {
        "gsb_result": named[label],
        "video_1_scores": scores_A,
        "video_2_scores": scores_B,
    }
    return f"<answer>{json.dumps(truth)}</answer>"


def make(job: VideoJob) -> list[dict[str, object]]:
    """The CSV rows of a job; its mp4 files are on disk afterwards."""
    import torch

    from common.distributed import derive_seed
    from common.video_io import write_mp4
    from toy.world import FPS, FRAMES, caption, measure, split_attributes

    torch.set_num_threads(1)
    train, heldout = split_attributes()
    combinations = heldout if SPLITS[job.split].heldout else train
    rows = range(job.start, job.start + job.count)
    rngs = [random.Random(derive_seed(job.seed, job.split, row)) for row in rows]
    wishes = [rng.choice(combinations) for rng in rngs]
    prompts = [
        caption(wish, wording=rng.randrange(4))
        for wish, rng in zip(wishes, rngs, strict=True)
    ]
    sides = [
        random.Random(derive_seed(job.seed, job.split, row, side))
        for row in rows
        for side in "AB"
    ]
    both = [prompt for prompt in prompts for _ in "AB"]
    drawn = draw(job, [wish for wish in wishes for _ in "AB"], both, sides)
    names = [
        f"videos/{job.split}_{row:05d}_{side}.mp4" for row in rows for side in "AB"
    ]
    for name, video in zip(names, drawn.video_BTYXC, strict=True):
        write_mp4(job.out / name, video, FPS)
    verdicts = [
        measure(video, prompt)
        for video, prompt in zip(drawn.video_BTYXC, both, strict=True)
    ]
    totals = [verdict.total for verdict in verdicts]
    thoughts = think(job.judge, both, [job.out / name for name in names])

    table = []
    for i, prompt in enumerate(prompts):
        a, b = 2 * i, 2 * i + 1
        label = (
            "A" if totals[a] > totals[b] else "B" if totals[a] < totals[b] else "same"
        )
        table.append(
            {
                "videos": repr([names[a], names[b]]),
                "problem": f"<video>\nHow well does the video show: {prompt}?",
                "durations": repr([FRAMES / FPS] * 2),
                "prompt": prompt,
                "CoT_A": thoughts[a],
                "CoT_B": thoughts[b],
                "GSB": label,
                "answer": answer(label, verdicts[a].scores, verdicts[b].scores),
                "oracle_A": totals[a],
                "oracle_B": totals[b],
                "sources": f"{drawn.sources[a]} {drawn.sources[b]}",
            }
        )
    return table


def split_size(word: str) -> tuple[str, int]:
    """``train=2000``."""
    name, _, count = word.partition("=")
    if name not in SPLITS or not count.isdecimal() or not int(count):
        raise argparse.ArgumentTypeError(
            f"{word!r} is not SPLIT=COUNT with SPLIT one of {', '.join(SPLITS)}"
        )
    return name, int(count)


def main() -> None:
    default, names = {"train": 2000, "heldout": 700}, ", ".join(SPLITS)
    sizes = " ".join(f"{name}={count}" for name, count in default.items())
    config, judge = Path("configs/shapes/sample.yaml"), Path("assets/shapes/qwen")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for SPLIT.csv of each split, videos/ and done.json",
    )
    add("--pairs", type=split_size, nargs="+", default=[*default.items()], metavar="SPLIT=COUNT",
        help=f"tables and how many pairs each has, of {names} (default: {sizes})")  # fmt: skip
    add(
        "--seed",
        type=int,
        default=0,
        help="what decides every video, label and chain (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=2,
        help="processes; they change no byte (default: %(default)s)",
    )
    add(
        "--config",
        type=Path,
        default=config,
        help="launch/sample.py's, of the generator (default: %(default)s)",
    )
    add(
        "--judge",
        type=Path,
        default=judge,
        help="Qwen3-VL that writes the chains (default: %(default)s)",
    )
    args = parser.parse_args()

    from tqdm import tqdm

    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    jobs = [
        VideoJob(
            args.out,
            split,
            start,
            min(CHUNK, count - start),
            args.seed,
            args.config,
            args.judge,
        )
        for split, count in args.pairs
        for start in range(0, count, CHUNK)
    ]
    tables: dict[tuple[str, int], list[dict[str, object]]] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(make, job): job for job in jobs}
        with tqdm(
            total=sum(job.count for job in jobs), desc="pairs", unit="pair"
        ) as bar:
            for done in as_completed(running):
                job = running[done]
                tables[job.split, job.start] = done.result()
                bar.update(job.count)

    counts: dict[str, dict[str, int]] = {}
    for split, _ in args.pairs:
        rows = [row for key in sorted(tables) if key[0] == split for row in tables[key]]
        with open(args.out / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        counts[split] = {
            label: sum(row["GSB"] == label for row in rows)
            for label in ("A", "B", "same")
        }
    (args.out / "done.json").write_text(
        json.dumps(counts, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
