"""Sample videos for a list of prompts, from a generator with or without a trained adapter.

    python launch/sample.py --config configs/wan/sample.yaml prompts=prompts.txt out=videos
    deepspeed launch/sample.py vbench --config configs/wan/vbench.yaml out=runs/vbench/base

Writes mp4 files and samples.jsonl. A killed run continues when it is started again, and ranks share
the videos. The same seeds with and without ``adapter=FOLDER`` give videos to compare in pairs.
``vbench`` samples VBench's standard prompts for `launch/evaluate.py vbench`, see docs/vbench.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import read_command, run_command, take_kind
from launch.next_recipe import next_recipe
from launch.schemas.training import SampleRun

if TYPE_CHECKING:
    from common.types import Prompt
    from launch.evaluation.sampling import SampleRequest

# Settings that change no video.
NOT_IN_A_VIDEO = ("out", "limit")


def main(argv: Sequence[str] | None = None) -> None:
    """Sample the prompts of a file or, with the word ``vbench``, those of VBench."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Without a kind, the prompts of a file.
    if take_kind(words, ["vbench"]) is None:
        run_command(
            SampleRun,
            lambda command: sample(command.cfg, resume=command.resume),
            words,
            description=__doc__,
        )
        return
    # VBench's schema is read only where it is needed.
    from launch.schemas.vbench import VbenchSampleRun
    from launch.vbench_eval.sample import sample_vbench

    vbench = read_command(VbenchSampleRun, words, description=__doc__)
    sample_vbench(vbench.cfg, resume=vbench.resume)


def sample(cfg: SampleRun, *, resume: str = "auto") -> None:
    """Sample out/0000.mp4, 0001.mp4, ... prompt by prompt, and write config.yaml.

    Exits with code 2 where a file cannot be read or the folder holds other videos.
    """
    from common.cli import user_errors
    from launch.evaluation.results_table import all_ranks

    with all_ranks(folder=cfg.out):
        from alignment.prompts import image_files, read_image_prompts
        from common.config import dump
        from common.distributed import is_main
        from common.log import say
        from launch.evaluation.sampling import (
            keep_earlier,
            open_table,
            sample_videos,
        )

        with user_errors():
            prompts = read_image_prompts(cfg.prompts)
            inputs = {"prompts": cfg.prompts, **image_files(prompts)}
            table = open_table(cfg, inputs, without=NOT_IN_A_VIDEO, resume=resume)
        if is_main():
            dump(cfg, cfg.out)
        # With ``limit``, only the videos of the first prompts.
        requests = list_requests(cfg, prompts)
        wanted = requests
        if cfg.limit is not None:
            wanted = requests[: cfg.limit * cfg.seeds]
        sample_videos(cfg, wanted, Path(cfg.out), table)
        keep_earlier(table, requests, wanted)
        say(f"{len(wanted)} videos in {cfg.out}")
        say(
            f"next: python launch/score.py --config {next_recipe('score')} "
            f"--prompts {cfg.out}/samples.jsonl --out {cfg.out}/scores.jsonl"
        )


def list_requests(cfg: SampleRun, prompts: Sequence[Prompt]) -> list[SampleRequest]:
    """Name the videos of all prompts, ``seeds`` of each, and derive their seeds."""
    from common.distributed import derive_seed
    from common.types import text_of
    from launch.evaluation.sampling import SampleRequest

    requests = []
    for i, prompt in enumerate(prompts):
        # The seed of a video depends on its place only, not on the adapter.
        for k in range(cfg.seeds):
            file = f"{len(requests):04d}.mp4"
            seed = derive_seed(cfg.seed, "sample", i, k)
            row = {"prompt": text_of(prompt)}
            requests.append(SampleRequest(file, prompt, seed, row))
    return requests


if __name__ == "__main__":
    main()
