"""Films VBench's prompts under the names VBench looks for; a killed run goes on, and ranks share the videos.

out/videos/{prompt}-{index}.mp4   nothing else lies there: VBench takes the ending of all names from the first it finds
out/samples.jsonl                 a row a video: file, prompt, index, seed, what the generator read, adapter

One video is sampled at a time. In a batch its rounding would depend on its neighbours, and those on how many ranks
there are and where an earlier run was killed; alone, a video has the same bits always.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.rows import RowTable
    from launch.vbench_runs import VbenchSampleRun
    from launch.vbench_suite import SuiteVideo

NOT_IN_A_VIDEO = ("out", "info", "limit", "dimensions", "videos", "flickering")  # settings that change no video


def sample_vbench(cfg: VbenchSampleRun, *, resume: str = "auto") -> None:
    """All videos of the suite that are not there yet, then samples.jsonl in the suite's order."""
    from launch.refuse import refuse
    from launch.rows import all_ranks
    from launch.vbench_suite import read_rewritten, read_suite

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        refuse(f"adapter: there is no folder {cfg.adapter}")
    with all_ranks():
        from common.distributed import from_main, is_main, rank, world_size
        from common.log import say

        try:
            suite = read_suite(cfg.info)
            prompts = suite.prompts(cfg.dimensions)[: cfg.limit]
            texts = read_rewritten(cfg.augmented, prompts) if cfg.augmented else {prompt: prompt for prompt in prompts}
            table = open_table(cfg, suite.path, resume)
        except ValueError as error:
            refuse(str(error))
        wanted = suite.videos(prompts, each=cfg.videos, flickering=cfg.flickering)
        folder = Path(cfg.out) / "videos"
        if problem := from_main(prepare(cfg, folder) if is_main() else None):
            refuse(problem)
        # rank 0 looks, for all: another rank might see what the first ones have already written
        places = from_main([i for i, video in enumerate(wanted) if not _is_there(video, folder, table)])
        kind = "the standard suite" if suite.is_standard else f"NOT the standard suite: {suite.path}"
        say(f"{len(prompts)} prompts, {len(wanted)} videos, {len(places)} to make ({kind})")
        own = [wanted[i] for i in places[rank() :: world_size()]]
        if own:
            film(cfg, own, texts, folder, table)
        # what earlier runs made of other prompts stays in the table
        whole = suite.videos(suite.prompts(), each=100, flickering=100)
        made = table.done | {(video.name,) for video in wanted}
        table.finish([key for video in whole if (key := (video.name,)) in made])
        say(f"{len(wanted)} videos in {folder}")


def open_table(cfg: VbenchSampleRun, info: Path, resume: str) -> RowTable:
    """The videos of this configuration. Raises ValueError where there are videos of another."""
    from common.run_record import plain
    from launch.rows import RowTable, fingerprint

    settings = {name: value for name, value in plain(cfg).items() if name not in NOT_IN_A_VIDEO}
    inputs = {"info": info, "augmented": cfg.augmented, "generator": cfg.generator.path, "adapter": cfg.adapter}
    files = {name: fingerprint(path) for name, path in inputs.items() if path is not None}
    path = Path(cfg.out) / "samples.jsonl"
    return RowTable(path, identity={**settings, "files": files}, key=("file",), resume=resume)


def prepare(cfg: VbenchSampleRun, folder: Path) -> str | None:
    """Make the folder, with config.yaml beside it; a problem, or None."""
    from common.config import dump
    from launch.vbench_suite import strangers

    folder.mkdir(parents=True, exist_ok=True)
    dump(cfg, cfg.out)
    return strangers(folder)


def film(cfg: VbenchSampleRun, own: list[SuiteVideo], texts: dict[str, str], folder: Path, table: RowTable) -> None:
    """Make this rank's videos, one by one: whole files only, then their rows."""
    from common.distributed import derive_seed, rank
    from common.log import progress
    from common.video_io import write_mp4
    from launch.compose import build_generator, quiet

    quiet()
    generator = build_generator(cfg.generator)
    if cfg.adapter is not None:
        generator.load_trained(cfg.adapter)
    partial = folder.with_name(f"partial.rank-{rank()}.mp4")  # not among the videos: a killed run leaves it behind
    for video in progress(own, len(own), "sample"):
        seed, text = derive_seed(cfg.seed, "vbench", video.prompt, video.index), texts[video.prompt]
        clean = generator.sample([text], seeds=[seed], scheduler=cfg.scheduler)
        write_mp4(partial, generator.decode(clean)[0], cfg.generator.fps, crf=cfg.crf)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(folder / video.name)
        row = {"file": video.name, "prompt": video.prompt, "index": video.index, "seed": seed}
        table.add([{**row, "text": text, "adapter": cfg.adapter}])


def _is_there(video: SuiteVideo, folder: Path, table: RowTable) -> bool:
    """A file without a row may be of another configuration, whose table was left behind; it is made again."""
    return (video.name,) in table.done and (folder / video.name).is_file()
