"""A rank that samples VBench's prompts with `SeedGenerator`, without diffusers."""

from __future__ import annotations

import sys

import launch.compose
from launch import sample
from tests.launch.vbench_eval.test_sample import SeedGenerator

if __name__ == "__main__":
    generator = SeedGenerator()
    launch.compose.build_generator = lambda cfg: generator
    sample.main(["--local_rank=0", "vbench", *sys.argv[1:]])
    sys.stdout.write(f"sampled {len(generator.seen)}\n")
