"""Sample videos for a list of prompts, from a generator with or without a trained adapter.

    python launch/sample.py --config configs/wan/sample.yaml adapter=runs/grpo/final prompts=prompts.txt out=videos

Writes mp4 files and samples.jsonl. The same seeds with and without ``adapter`` give videos to compare side by side.
"""

from __future__ import annotations

from pathlib import Path

from launch.command import read_command
from launch.runs import SampleRun


def main() -> None:
    sample(read_command(SampleRun, description=__doc__.splitlines()[0]).cfg)


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
