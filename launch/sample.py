"""Sample videos for a list of prompts, from a generator with or without a trained adapter.

    python launch/sample.py --config configs/wan/sample.yaml adapter=runs/grpo/final prompts=prompts.txt out=videos
    deepspeed launch/sample.py vbench --config configs/wan/vbench.yaml adapter=runs/grpo/final out=runs/vbench/tuned

Writes mp4 files and samples.jsonl; a killed run goes on, and ranks share the videos. The same seeds with and without
``adapter`` give videos to compare side by side. ``vbench`` films VBench's standard prompts instead, for
`launch/evaluate.py vbench`: see docs/vbench.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import read_command, take_kind
from launch.schemas.training import SampleRun

NOT_IN_A_VIDEO = ("out", "limit")  # settings that change no video


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if take_kind(words, ["vbench"]) is None:
        command = read_command(SampleRun, words, description=__doc__.splitlines()[0])
        sample(command.cfg, resume=command.resume)
        return
    from launch.schemas.vbench import VbenchSampleRun
    from launch.vbench_eval.sample import sample_vbench

    vbench = read_command(
        VbenchSampleRun, words, description=VbenchSampleRun.__doc__.splitlines()[0]
    )
    sample_vbench(vbench.cfg, resume=vbench.resume)


def sample(cfg: SampleRun, *, resume: str = "auto") -> None:
    """out/0000.mp4, 0001.mp4, ... prompt by prompt, and config.yaml; exit with code 2 where something cannot be read or
    the folder holds other videos.
    """
    from common.cli import user_errors
    from launch.evaluation.results_table import all_ranks

    with all_ranks():
        from alignment.prompts import read_prompts
        from common.config import dump
        from common.distributed import derive_seed, is_main
        from common.log import say
        from launch.evaluation.sampling import SampleRequest, open_table, sample_videos

        with user_errors():
            prompts = read_prompts(cfg.prompts)
            table = open_table(
                cfg, {"prompts": cfg.prompts}, without=NOT_IN_A_VIDEO, resume=resume
            )
        if is_main():
            dump(cfg, cfg.out)
        every = [
            SampleRequest(
                f"{i * cfg.seeds + k:04d}.mp4",
                prompt,
                derive_seed(cfg.seed, "sample", i, k),
                {"prompt": prompt},
            )
            for i, prompt in enumerate(prompts)
            for k in range(cfg.seeds)
        ]
        shots = every[: None if cfg.limit is None else cfg.limit * cfg.seeds]
        sample_videos(cfg, shots, Path(cfg.out), table)
        made = table.done | {(shot.file,) for shot in shots}
        table.finish(
            [key for shot in every if (key := (shot.file,)) in made]
        )  # with what a larger limit made
        say(f"{len(shots)} videos in {cfg.out}")


if __name__ == "__main__":
    main()
