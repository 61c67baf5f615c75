"""Sample videos for a list of prompts, from a generator with or without a trained adapter.

    python launch/sample.py --config configs/wan/sample.yaml adapter=runs/grpo/final prompts=prompts.txt out=videos
    deepspeed launch/sample.py vbench --config configs/wan/vbench.yaml adapter=runs/grpo/final out=runs/vbench/tuned

Writes mp4 files and samples.jsonl. The same seeds with and without ``adapter`` give videos to compare side by side.
``vbench`` films VBench's standard prompts instead, for `launch/evaluate.py vbench`: see docs/vbench.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import read_command
from launch.kinds import take_kind
from launch.runs import SampleRun


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if take_kind(words, ["vbench"]) is None:
        sample(read_command(SampleRun, words, description=__doc__.splitlines()[0]).cfg)
        return
    from launch.vbench_runs import VbenchSampleRun
    from launch.vbench_samples import sample_vbench

    command = read_command(VbenchSampleRun, words, description=VbenchSampleRun.__doc__.splitlines()[0])
    sample_vbench(command.cfg, resume=command.resume)


def sample(cfg: SampleRun) -> None:
    """All videos of a `SampleRun`, in the order prompt by prompt."""
    from launch.compose import build_generator, quiet

    quiet()
    from alignment.data import read_prompts
    from common.distributed import derive_seed
    from common.log import progress, say
    from launch.samples import SampleWriter

    prompts = read_prompts(cfg.prompts)[: cfg.limit]
    generator = build_generator(cfg.generator)
    if cfg.adapter is not None:
        generator.load_trained(cfg.adapter)
    rows = [
        {"prompt": prompt, "seed": derive_seed(cfg.seed, "sample", i, k), "adapter": cfg.adapter}
        for i, prompt in enumerate(prompts)
        for k in range(cfg.seeds)
    ]
    writer = SampleWriter(Path(cfg.out), fps=cfg.generator.fps, crf=cfg.crf)
    for first in progress(range(0, len(rows), cfg.batch), None, "sample"):
        part = rows[first : first + cfg.batch]
        clean = generator.sample([r["prompt"] for r in part], seeds=[r["seed"] for r in part], scheduler=cfg.scheduler)
        writer.add(generator.decode(clean), part)
    say(f"{len(rows)} videos in {cfg.out}")


if __name__ == "__main__":
    main()
