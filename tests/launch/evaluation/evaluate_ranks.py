"""A rank of an evaluation with `GreyGenerator`, so that no rank imports diffusers."""

from __future__ import annotations

import sys

import launch.compose
from launch import evaluate
from tests.launch.evaluation.test_generator import GreyGenerator

if __name__ == "__main__":
    generator = GreyGenerator()
    launch.compose.build_generator = lambda cfg: generator
    evaluate.main(["--local_rank=0", "generator", *sys.argv[1:]])
    sys.stdout.write(f"sampled {len(generator.seeds)}\n")
