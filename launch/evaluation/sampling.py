"""A list of videos to make, made once: a killed run goes on, and ranks share what is left.

One video is sampled at a time. In a batch its rounding would depend on its neighbours, and those on how many ranks
there are and where an earlier run was killed; alone, a video has the same bits always.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable
    from launch.schemas.training import SampleRun
    from launch.schemas.vbench import VbenchSampleRun


@dataclass(frozen=True)
class SampleRequest:
    """A video: the name of its file, what the generator reads, its seed, and what else its row says."""

    file: str
    text: str
    seed: int
    row: Mapping[str, Any]


def open_table(
    cfg: SampleRun | VbenchSampleRun,
    inputs: Mapping[str, str | Path | None],
    *,
    without: Iterable[str],
    resume: str,
) -> ResultsTable:
    """The videos of this configuration, whose files are known by what is in them.

    without  settings that change no video, so that a run with others goes on

    Raises ValueError where the folder holds videos of another configuration, or the adapter is no folder.
    """
    from common.run_record import plain
    from launch.evaluation.results_table import ResultsTable, fingerprint
    from launch.evaluation.samples import FILE

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        raise ValueError(f"adapter: there is no folder {cfg.adapter}")
    skipped = set(without)
    settings = {
        name: value for name, value in plain(cfg).items() if name not in skipped
    }
    inputs = {**inputs, "generator": cfg.generator.path, "adapter": cfg.adapter}
    files = {
        name: fingerprint(path) for name, path in inputs.items() if path is not None
    }
    return ResultsTable(
        Path(cfg.out) / FILE,
        identity={**settings, "files": files},
        key=("file",),
        resume=resume,
    )


def sample_videos(
    cfg: SampleRun | VbenchSampleRun,
    shots: Sequence[SampleRequest],
    folder: Path,
    table: ResultsTable,
    *,
    what: str = "",
) -> None:
    """Make those that are not in ``folder`` yet, on all ranks together, and say how many (``what`` goes before)."""
    from common.distributed import from_main, rank, world_size
    from common.log import say

    # rank 0 looks, for all: another rank might see what the first ones have already written
    places = from_main(
        [i for i, shot in enumerate(shots) if not _is_there(shot, folder, table)]
    )
    say(f"{what}{len(shots)} videos, {len(places)} to make")
    if own := [shots[i] for i in places[rank() :: world_size()]]:
        _film(cfg, own, folder, table)


def _film(
    cfg: SampleRun | VbenchSampleRun,
    own: Sequence[SampleRequest],
    folder: Path,
    table: ResultsTable,
) -> None:
    """Make this rank's videos, one by one: whole files only, then their rows."""
    from common.cli import user_errors
    from common.distributed import rank
    from common.log import progress
    from common.video_io import write_mp4
    from launch.compose import quiet, trained_generator

    quiet()
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
    partial = (
        Path(cfg.out) / f".partial.rank-{rank()}.mp4"
    )  # a killed run leaves it behind
    for shot in progress(own, len(own), "sample"):
        clean = generator.sample(
            [shot.text], seeds=[shot.seed], scheduler=cfg.scheduler
        )
        write_mp4(partial, generator.decode(clean)[0], cfg.generator.fps, crf=cfg.crf)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(folder / shot.file)
        table.add(
            [{"file": shot.file, **shot.row, "seed": shot.seed, "adapter": cfg.adapter}]
        )


def _is_there(shot: SampleRequest, folder: Path, table: ResultsTable) -> bool:
    """A file without a row may be of another configuration, whose table was left behind; it is made again."""
    return (shot.file,) in table.done and (folder / shot.file).is_file()
