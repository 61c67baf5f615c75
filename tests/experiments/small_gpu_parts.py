"""A part of the GPU check on small models, run by test_gpu_check.py in a process of its own.

    python tests/experiments/small_gpu_parts.py PART measure|rehearse

Prints a JSON line: what is measured on the CPU, or rehearsed on a simulated GPU.
"""

from __future__ import annotations

import json
import sys

import torch

from common import distributed
from experiments import gpu_parts
from experiments.gpu_parts import Subject
from experiments.gpu_rates import RateSizes
from experiments.gpu_rehearsal import rehearse_part
from launch.compose import quiet
from tests.launch.processes import ROOT

SMALL = RateSizes(
    gemm=64,
    heads=2,
    tokens=48,
    head_dim=16,
    math_tokens=32,
    channels=4,
    frames=2,
    height=6,
    width=8,
    copied=1 << 10,
)
SIZE = ("generator.height=32", "generator.width=32", "generator.num_frames=5")


def small_subject() -> Subject:
    """Classes of the published models, in small."""
    wan = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    vae = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    config = json.loads((ROOT / "assets/shapes/qwen/config.json").read_text())
    names = ("text_config", "vision_config", "tie_word_embeddings", "image_token_id")
    return Subject(
        wan,
        vae,
        {name: config[name] for name in names},
        words=(*SIZE, "generator.lora.rank=4"),
        rates=SMALL,
    )


def main(part: str, mode: str) -> None:
    quiet()
    if mode == "rehearse":
        found = rehearse_part(part, small_subject(), "h100")
    else:
        # compiling would take a minute
        gpu_parts.compile_blocks = lambda _: None
        distributed.init_process_group()
        found = gpu_parts.measure(part, small_subject(), torch.device("cpu"))
        distributed.shutdown()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
