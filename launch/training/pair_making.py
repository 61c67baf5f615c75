"""Make a set of pairs from prompts, or from a table of videos. Ranks share the work.

Every prompt (or row) is an independent item: its file in candidates/ and its line in
candidates.jsonl depend on nothing else. Whichever rank makes it and however often the run was
stopped, the set has the same bytes; a kill costs one prompt.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignment.pair_store import LatentPair, under, write_pairs
from alignment.pairs import Choices, choose
from alignment.rewards.errors import contained_score
from common import distributed
from common import progress as phases
from common.checkpoint import load_tensors, save_tensors
from common.cli import user_errors
from common.log import progress, say
from common.types import ImagePrompt, json_number, text_of
from generator.latents import require_finite_latents
from launch.evaluation.results_table import ResultsTable, Row, attempt, failed

if TYPE_CHECKING:
    from alignment.config import PairConfig
    from common.types import Prompt, RewardModel
    from generator.wan import WanGenerator
    from rm.data import Pair
    from rm.video_check import VideoChecker

CANDIDATES = "candidates"
# What the name of a tensor begins with that tells of the prompt's image.
IMAGE = "image."
# The tensors of an item, "latent", "embedding" and those of an image, and its row.
Candidate = tuple[dict[str, torch.Tensor], Row]


@dataclass(frozen=True)
class PairOutput:
    """Where and how a set is written.

    identity   Everything that decides the set's bytes, as JSON.
    resume     "auto" goes on with a set of this identity, "none" begins again.
    per_shard  Pairs in a file.
    store      The dtype of the stored latents.
    keep       Keep the candidates after the set is written.
    """

    folder: Path
    identity: Mapping[str, Any]
    resume: str
    per_shard: int = 64
    store: str = "float32"
    keep: bool = False


def make_pairs(
    output: PairOutput,
    prompts: Sequence[Prompt],
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    weights: Mapping[str, float],
    *,
    how: PairConfig,
    seed: int,
) -> None:
    """Make a set of pairs from prompts. All ranks call it.

    Raises ValueError when no pair is left.
    """
    # sample and score candidates of every prompt
    make = sample_candidates(generator, rewards, count=how.candidates, seed=seed)
    rows = make_candidates(output, prompts, make)

    # choose a pair of each prompt, and write them
    choices, pairs = pair_up(output.folder, rows, weights, how)
    counts = {
        "prompts": len(rows),
        "pairs": len(choices.pairs),
        "failed": sum("error" in row for row in rows),
        "unjudged": choices.unscored,
        "close": choices.close,
        "disagreed": choices.disagreed,
    }
    write_output(output, pairs, rows, counts)


def make_candidates(
    output: PairOutput, items: Sequence[Any], make: Callable[[int, Any], Candidate]
) -> list[Row]:
    """Call ``make(i, item)`` for every item, save its tensors and row, and return all rows.

    An item that raises ValueError gets the row {"error": reason}, and is tried again when the
    run is started again. All ranks call it; the rows come in the order of the items.
    """
    folder = output.folder
    (folder / CANDIDATES).mkdir(parents=True, exist_ok=True)
    table = ResultsTable(
        folder / f"{CANDIDATES}.jsonl",
        identity=output.identity,
        resume=output.resume,
        retry=failed,
    )
    # a finished item is not made again
    keys = [(i,) for i in range(len(items))]
    share = table.share(keys)
    if len(share) < len(items):
        say(
            f"{len(items)} to do, {len(table.done)} of them done before, "
            f"{len(share)} on this rank"
        )

    def make_rows(numbers: Sequence[int]) -> list[Row]:
        (i,) = numbers
        tensors, row = make(i, items[i])
        # a file with its final name is complete
        partial = folder / CANDIDATES / f"tmp-{i:06d}.safetensors"
        save_tensors(partial, tensors)
        partial.rename(file_of(folder, i))
        return [row]

    # an item's row is written after its tensors
    for (i,) in progress(share, len(share), "pairs"):
        (row,) = attempt(make_rows, [i])
        table.add([{"index": i, **row}])
    return table.finish(keys)


def file_of(folder: Path, index: int) -> Path:
    """Return the file of an item's tensors."""
    return folder / CANDIDATES / f"{index:06d}.safetensors"


def sample_candidates(
    generator: WanGenerator,
    rewards: Mapping[str, RewardModel],
    *,
    count: int,
    seed: int,
) -> Callable[[int, Prompt], Candidate]:
    """Return a function (number, prompt) -> ``count`` sampled latents and their scores."""

    def make(i: int, prompt: Prompt) -> Candidate:
        # sample
        phases.enter("sampling")
        seeds = [distributed.derive_seed(seed, "pairs", i, k) for k in range(count)]
        prompts = [prompt] * count
        clean_KCFHW = generator.sample(prompts, seeds)
        with user_errors():
            require_finite_latents(clean_KCFHW, prompts, seeds)
        phases.enter("decode")
        video_KTYXC = generator.decode(clean_KCFHW)

        # score
        text = text_of(prompt)
        texts = [text] * count
        scores = {}
        for name, reward in rewards.items():
            phases.enter(f"score/{name}")
            score = contained_score(reward, video_KTYXC, texts, fps=generator.cfg.fps)
            scores[name] = [json_number(value) for value in score.value_B]
        # what training needs of this item
        tensors = {
            "latent": clean_KCFHW,
            "embedding": generator.prompts.rows_of(text),
        }
        row: Row = {"prompt": text, "seeds": seeds, "rewards": scores}
        if isinstance(prompt, ImagePrompt):
            row["image"] = prompt.image
            for name, tensor in generator.images.get(prompt.image).tensors().items():
                tensors[IMAGE + name] = tensor
        return tensors, row

    return make


def encode_pair(
    generator: WanGenerator, csv: str, checker: VideoChecker
) -> Callable[[int, Pair], Candidate]:
    """Return a function (number, pair of files) -> latents, the chosen video first.

    The function raises ValueError, naming the row of the table, for a video that cannot be read.
    """
    from common.video_io import read_frames

    names = ("num_frames", "fps", "height", "width")
    size = {name: getattr(generator.cfg, name) for name in names}

    def make(i: int, pair: Pair) -> Candidate:
        # the label is positive when people prefer video A
        files = [pair.video_A, pair.video_B]
        if pair.label <= 0:
            files.reverse()
        try:
            checker.require(*files)
            videos = [read_frames(file, **size) for file in files]
        except ValueError as error:
            raise ValueError(f"{csv}:{pair.line}: {error}") from error
        tensors = {
            "latent": generator.encode(torch.stack(videos)),
            "embedding": generator.prompts.rows_of(pair.prompt),
        }
        return tensors, {"prompt": pair.prompt, "files": [file.name for file in files]}

    return make


def pair_up(
    folder: Path, rows: Sequence[Row], weights: Mapping[str, float], how: PairConfig
) -> tuple[Choices, Iterator[LatentPair]]:
    """Choose a pair among the scored candidates of each prompt, and read the chosen latents."""
    # prompts whose sampling failed take no part
    complete = [row for row in rows if "error" not in row]
    # JSON has no NaN: null stands for it
    values = {}
    for name in weights:
        scores = [
            [math.nan if value is None else value for value in row["rewards"][name]]
            for row in complete
        ]
        table = torch.tensor(scores, dtype=torch.float64)
        values[name] = table.view(-1, how.candidates)
    choices = choose(values, weights, how)

    def read() -> Iterator[LatentPair]:
        for choice in choices.pairs:
            row = complete[choice.prompt]
            tensors = load_tensors(file_of(folder, row["index"]))
            seeds = row["seeds"]
            prompt = row["prompt"]
            if "image" in row:
                prompt = ImagePrompt(prompt, row["image"])
            yield LatentPair(
                prompt,
                tensors["latent"][choice.chosen],
                tensors["latent"][choice.rejected],
                tensors["embedding"],
                choice.chosen_value,
                choice.rejected_value,
                source=f"seeds {seeds[choice.chosen]} {seeds[choice.rejected]}",
                condition=under(IMAGE, tensors, tensors.__getitem__),
            )

    return choices, read()


def labelled(folder: Path, rows: Sequence[Row]) -> Iterator[LatentPair]:
    """Read the pairs of a table, whose files hold the chosen video first."""
    for row in rows:
        if "error" not in row:
            tensors = load_tensors(file_of(folder, row["index"]))
            # the chosen video is first
            chosen_CFHW, rejected_CFHW = tensors["latent"]
            yield LatentPair(
                row["prompt"],
                chosen_CFHW,
                rejected_CFHW,
                tensors["embedding"],
                source=" ".join(row["files"]),
            )


def write_output(
    output: PairOutput,
    pairs: Iterator[LatentPair],
    rows: Sequence[Row],
    counts: Mapping[str, int],
) -> None:
    """Write the set on rank 0, and report the counts. All ranks call it and wait.

    Raises ValueError when no pair is left.
    """
    # report what was left out
    failed = [row for row in rows if "error" in row]
    for row in failed[:10]:
        say(f"left out, number {row['index']}: {row['error']}")
    listed = ", ".join(f"{value} {name}" for name, value in counts.items())
    if not counts["pairs"]:
        raise ValueError(f"no pair is left: {listed}")

    # write
    if distributed.is_main():
        write_pairs(
            output.folder,
            pairs,
            per_shard=output.per_shard,
            dtype=getattr(torch, output.store),
            about={"counts": dict(counts), "identity": dict(output.identity)},
        )
        if not output.keep:
            shutil.rmtree(output.folder / CANDIDATES)
    distributed.barrier()
    say(f"{output.folder}: {listed}")
