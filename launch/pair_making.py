"""From prompts, or from a table of videos, to a set of pairs on disk. Ranks share the work, a kill costs one prompt.

Every prompt (or row) is a unit of its own: its file in candidates/ and its line in candidates.jsonl depend on nothing
else, so whoever makes it and however often the run was stopped, the set has the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignment.pair_store import LatentPair, write_pairs
from alignment.pairs import Choices, choose
from common import distributed
from common.checkpoint import load_tensors, save_tensors
from common.log import progress, say
from common.types import json_number
from launch.evaluation.results_table import ResultsTable, Row, attempt

if TYPE_CHECKING:
    from alignment.config import PairConfig
    from common.types import RewardModel
    from generator.wan import WanGenerator
    from rm.data import Pair
    from rm.video_check import VideoChecker

CANDIDATES = "candidates"


def candidates_of(
    folder: Path,
    items: Sequence[Any],
    make: Callable[[int, Any], tuple[dict[str, torch.Tensor], Row]],
    *,
    identity: Mapping[str, Any],
    resume: str,
) -> list[Row]:
    """``make(i, item)`` for every item, its tensors in candidates/ and its row in candidates.jsonl; all rows in order.

    An item that raises ValueError gets the row {"error": reason} and is tried again when the run is.
    """
    (folder / CANDIDATES).mkdir(parents=True, exist_ok=True)
    table = ResultsTable(
        folder / f"{CANDIDATES}.jsonl", identity=identity, resume=resume, retry="error"
    )
    own = table.share((i,) for i in range(len(items)))
    if len(own) < len(items):
        say(
            f"{len(items)} to do, {len(table.done)} of them done before, {len(own)} on this rank"
        )

    def one(numbers: Sequence[int]) -> list[Row]:
        (i,) = numbers
        tensors, row = make(i, items[i])
        partial = folder / CANDIDATES / f"tmp-{i:06d}.safetensors"
        save_tensors(partial, tensors)
        partial.rename(file_of(folder, i))
        return [row]

    for (i,) in progress(own, len(own), "pairs"):
        (row,) = attempt(one, [i])
        table.add([{"index": i, **row}])
    return table.finish([(i,) for i in range(len(items))])


def file_of(folder: Path, index: int) -> Path:
    """Where an item's tensors are."""
    return folder / CANDIDATES / f"{index:06d}.safetensors"


def film(
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    *,
    count: int,
    seed: int,
) -> Callable[[int, str], tuple[dict[str, torch.Tensor], Row]]:
    """A function (number of the prompt, prompt) -> its ``count`` videos as latents, and what rewards say of them."""

    def make(i: int, prompt: str) -> tuple[dict[str, torch.Tensor], Row]:
        seeds = [distributed.derive_seed(seed, "pairs", i, k) for k in range(count)]
        clean_KCFHW = generator.sample([prompt] * count, seeds)
        video_KTYXC = generator.decode(clean_KCFHW)
        scores = {
            name: one.score(video_KTYXC, [prompt] * count, fps=generator.cfg.fps)
            for name, one in rewards.items()
        }
        said = {
            name: [json_number(value) for value in score.value_B]
            for name, score in scores.items()
        }
        tensors = {
            "latent": clean_KCFHW,
            "embedding": generator.prompts.rows_of(prompt),
        }
        return tensors, {"prompt": prompt, "seeds": seeds, "rewards": said}

    return make


def digitise(
    generator: WanGenerator, csv: str, checker: VideoChecker
) -> Callable[[int, Pair], tuple[dict[str, torch.Tensor], Row]]:
    """A function (number of the pair, its files) -> both videos as latents, encoded by the VAE. Errors name the row."""
    from common.video_io import read_frames

    cfg = generator.cfg
    size = {
        "num_frames": cfg.num_frames,
        "fps": cfg.fps,
        "height": cfg.height,
        "width": cfg.width,
    }

    def make(i: int, pair: Pair) -> tuple[dict[str, torch.Tensor], Row]:
        files = (
            (pair.video_A, pair.video_B)
            if pair.label > 0
            else (pair.video_B, pair.video_A)
        )
        try:
            checker.require(*files)
            video_2TYXC = torch.stack([read_frames(file, **size) for file in files])
        except ValueError as error:
            raise ValueError(f"{csv}:{pair.line}: {error}") from error
        latent_2CFHW = generator.encode(video_2TYXC)
        tensors = {
            "latent": latent_2CFHW,
            "embedding": generator.prompts.rows_of(pair.prompt),
        }
        return tensors, {"prompt": pair.prompt, "files": [file.name for file in files]}

    return make


def pair_up(
    folder: Path, rows: Sequence[Row], weights: Mapping[str, float], how: PairConfig
) -> tuple[Choices, Iterator[LatentPair]]:
    """Choose among judged candidates, and read the chosen."""
    sound = [row for row in rows if "error" not in row]
    nan = float("nan")
    values = {
        name: torch.tensor(
            [[nan if v is None else v for v in row["rewards"][name]] for row in sound],
            dtype=torch.float64,
        ).view(len(sound), how.candidates)
        for name in weights
    }
    choices = choose(values, weights, how)

    def read() -> Iterator[LatentPair]:
        for choice in choices.pairs:
            row = sound[choice.prompt]
            found = load_tensors(file_of(folder, row["index"]))
            latent, both = found["latent"], (choice.winner, choice.loser)
            source = "seeds " + " ".join(str(row["seeds"][k]) for k in both)
            yield LatentPair(
                row["prompt"],
                *(latent[k] for k in both),
                found["embedding"],
                choice.chosen_value,
                choice.rejected_value,
                source,
            )

    return choices, read()


def labelled(folder: Path, rows: Sequence[Row]) -> Iterator[LatentPair]:
    """The pairs of a table, winner first."""
    for row in rows:
        if "error" not in row:
            found = load_tensors(file_of(folder, row["index"]))
            chosen, rejected = found["latent"]
            yield LatentPair(
                row["prompt"],
                chosen,
                rejected,
                found["embedding"],
                source=" ".join(row["files"]),
            )


def make_pairs(
    folder: Path,
    prompts: Sequence[str],
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    weights: Mapping[str, float],
    *,
    how: PairConfig,
    seed: int,
    per_shard: int,
    store: str,
    identity: Mapping[str, Any],
    resume: str = "auto",
    keep: bool = False,
) -> None:
    """The whole of it for prompts, into ``folder``. All ranks call it. Raises ValueError when no pair is left."""
    make = film(generator, rewards, count=how.candidates, seed=seed)
    rows = candidates_of(folder, prompts, make, identity=identity, resume=resume)
    choices, pairs = pair_up(folder, rows, weights, how)
    counts = {
        "prompts": len(rows),
        "pairs": len(choices.pairs),
        "failed": sum("error" in row for row in rows),
    }
    counts |= {
        "unjudged": choices.unjudged,
        "close": choices.close,
        "disagreed": choices.disagreed,
    }
    conclude(
        folder,
        pairs,
        rows,
        counts,
        per_shard=per_shard,
        store=store,
        identity=identity,
        keep=keep,
    )


def conclude(
    folder: Path,
    pairs: Iterator[LatentPair],
    rows: Sequence[Row],
    counts: Mapping[str, int],
    *,
    per_shard: int,
    store: str,
    identity: Mapping[str, Any],
    keep: bool,
) -> None:
    """Rank 0 writes the set and says what became of everything. All ranks call it, and wait for that.

    Raises ValueError when no pair is left.
    """
    said = ", ".join(f"{value} {name}" for name, value in counts.items())
    for row in [row for row in rows if "error" in row][:10]:
        say(f"left out, number {row['index']}: {row['error']}")
    if not counts["pairs"]:
        raise ValueError(f"no pair is left: {said}")
    if distributed.is_main():
        about = {"counts": dict(counts), "identity": dict(identity)}
        write_pairs(
            folder, pairs, per_shard=per_shard, dtype=getattr(torch, store), about=about
        )
        if not keep:
            shutil.rmtree(folder / CANDIDATES)
    distributed.barrier()
    say(f"{folder}: {said}")
