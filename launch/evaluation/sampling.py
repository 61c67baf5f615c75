"""Resumable sampling of a list of videos; ranks share the missing ones.

Videos are sampled in batches of size 1. In a larger batch the rounding of a video would depend on
its neighbours, and those on the number of ranks and on where an earlier run was killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.types import Prompt
    from launch.evaluation.results_table import ResultsTable
    from launch.schemas.training import SampleRun
    from launch.schemas.vbench import VbenchSampleRun


@dataclass(frozen=True)
class SampleRequest:
    """A video to sample: file name, prompt, seed, and further fields of its row."""

    file: str
    prompt: Prompt
    seed: int
    row: Mapping[str, Any]


def open_table(
    cfg: SampleRun | VbenchSampleRun,
    inputs: Mapping[str, str | Path | None],
    *,
    without: Iterable[str],
    resume: str,
) -> ResultsTable:
    """Open the table of the videos of this configuration, and identify its input files.

    ``without`` names settings that change no video; a run with other values of them continues.
    Raises ValueError where the folder holds videos of other settings, or the adapter is no folder.
    """
    from common.run_record import plain
    from launch.evaluation.results_table import ResultsTable, fingerprint
    from launch.evaluation.samples import FILE

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        raise ValueError(f"adapter: there is no folder {cfg.adapter}")
    # A video depends on the settings and on the content of the input files.
    identity = plain(cfg)
    for name in without:
        identity.pop(name, None)
    files = {**inputs, "generator": cfg.generator.path, "adapter": cfg.adapter}
    # the code of a generator of one's own
    if cfg.generator.target_file is not None:
        files["target"] = cfg.generator.target_file
    identity["files"] = {
        name: fingerprint(path) for name, path in files.items() if path is not None
    }
    path = Path(cfg.out) / FILE
    return ResultsTable(path, identity=identity, key=("file",), resume=resume)


def sample_videos(
    cfg: SampleRun | VbenchSampleRun,
    requests: Sequence[SampleRequest],
    folder: Path,
    table: ResultsTable,
    *,
    what: str = "",
) -> None:
    """Sample the videos that ``folder`` lacks, on all ranks together.

    The console line with their number starts with ``what``.
    """
    from common.cli import user_errors
    from common.distributed import from_main, rank, world_size
    from common.log import say
    from launch.compose import quiet, say_long_prompts

    # A file without a row may come from other settings whose table was deleted: sample it again.
    # Rank 0 decides for all ranks, because another rank could see files that are just written.
    missing = []
    for i, request in enumerate(requests):
        known = (request.file,) in table.done
        if not known or not (folder / request.file).is_file():
            missing.append(i)
    missing = from_main(missing)
    say(f"{what}{len(requests)} videos, {len(missing)} to make")
    if missing:
        quiet()
        # A prompt with several seeds counts once.
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        with user_errors():
            say_long_prompts(prompts, cfg.generator)
    # This rank samples its share.
    share = [requests[i] for i in missing[rank() :: world_size()]]
    if share:
        _sample_share(cfg, share, folder, table)


def keep_earlier(
    table: ResultsTable,
    every: Sequence[SampleRequest],
    wanted: Sequence[SampleRequest],
) -> None:
    """Finish the table with the wanted videos and those that earlier runs have sampled.

    The rows are in the order of ``every``.
    """
    made = table.done | {(request.file,) for request in wanted}
    keys = [(request.file,) for request in every]
    table.finish([key for key in keys if key in made])


def _sample_share(
    cfg: SampleRun | VbenchSampleRun,
    requests: Sequence[SampleRequest],
    folder: Path,
    table: ResultsTable,
) -> None:
    """Sample this rank's videos; each file is complete before it gets its name and its row."""
    from common import progress as phases
    from common.cli import user_errors
    from common.distributed import rank
    from common.log import progress
    from common.video_io import write_mp4
    from generator.latents import require_finite_latents
    from launch.compose import check_takes_images, trained_generator

    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        prompts = [request.prompt for request in requests]
        check_takes_images(cfg.generator, generator, prompts)
    # A killed run leaves this file behind; it lies outside ``folder``.
    partial = Path(cfg.out) / f".partial.rank-{rank()}.mp4"
    for request in progress(requests, len(requests), "sample"):
        phases.enter("sampling")
        clean = generator.sample(
            [request.prompt], seeds=[request.seed], scheduler=cfg.scheduler
        )
        with user_errors():
            require_finite_latents(clean, [request.prompt], [request.seed])
        phases.enter("decode")
        # On the disk before the name and the row.
        video_TYXC = generator.decode(clean)[0]
        write_mp4(partial, video_TYXC, cfg.generator.fps, crf=cfg.crf)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(folder / request.file)
        row = {"file": request.file, **request.row}
        row |= {"seed": request.seed, "adapter": cfg.adapter}
        table.add([row])
