"""`launch.cold_start.train` several times in one process: in one go, to the middle, resumed.

`cold_start_runs.py FOLDER` writes FOLDER/{base, pairs.csv, whole, stopped, one}; then, under a
launcher on two ranks, FOLDER/{two, three, three_stopped}, named after their ZeRO stage. It is
a process of its own, because deepspeed keeps state; test_cold_start_run.py starts it.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import torch

from common import distributed
from common.checkpoint import save_tensors
from common.config import load
from common.video_io import write_mp4
from launch.cold_start import build_task, read_pairs_to_train
from launch.command import train
from launch.schemas.training import ColdStartRun
from rm import cold_start
from rm.metrics import heldout_metrics
from tests.launch.processes import ZERO_3
from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, save_tiny_qwen


def write_data(folder: Path) -> None:
    base = save_tiny_qwen(folder / "base")
    SETTINGS.save(base / "video.json")
    TEMPLATE.save(base / "prompt.json")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["videos", "prompt", "CoT_A", "CoT_B", "GSB"])
        writer.writeheader()
        for i, label in enumerate(["A", "B", "A", "same"]):
            names = [f"{i}{side}.mp4" for side in "AB"]
            for side, name in enumerate(names):
                write_mp4(folder / name, random_frames(10 * i + side), 4.0)
            writer.writerow(
                {
                    "videos": repr(names),
                    "prompt": f"p{i}",
                    "CoT_A": "x",
                    "CoT_B": "yy",
                    "GSB": label,
                }
            )


def record_margins(folder: Path) -> None:
    """Write the held-out margins of every evaluation; the last one stays."""

    def recorded(model, margin_NK: torch.Tensor, pairs, **options):
        if distributed.is_main():
            save_tensors(folder / "margins.safetensors", {"margin_NK": margin_NK})
        return heldout_metrics(model, margin_NK, pairs, **options)

    cold_start.heldout_metrics = recorded


def run(folder: Path, name: str, *more: str, epochs: int) -> None:
    overrides = [
        f"run_dir={folder / name}",
        f"base={folder / 'base'}",
        f"data.train={folder / 'pairs.csv'}",
        f"data.heldout={folder / 'pairs.csv'}",
        "cold_start.pairs_per_step=3",
        "cold_start.micro_batch=1",
        f"cold_start.epochs={epochs}",
        "lora.rank=4",
        "lora.dropout=0.2",
        "eval_every=1",
        "save_every=1",
        "dtype=bfloat16",
        "zero_stage=1",
        "optimizer.warmup_steps=3",
        "lr.head=1e-3",
        *more,
    ]
    run = load(ColdStartRun, None, overrides)
    (folder / name).mkdir(exist_ok=True)
    record_margins(folder / name)
    train(run, read_pairs_to_train, build_task, resume="auto")


# equal on one rank and two: no dropout, whose draws follow the rank; ties count, so that an
# update has four pairs
COMPARED = (
    "dtype=float32",
    "lora.dropout=0",
    "cold_start.theta=2",
    "cold_start.pairs_per_step=4",
    "heldout_pairs=3",
    "lr.llm=1e-3",
    "lr.query=1e-3",
)


def main(root: Path) -> None:
    write_data(root)
    run(root, "whole", epochs=4)
    torch.manual_seed(1234)
    run(root, "stopped", epochs=2)
    run(root, "stopped", epochs=4)
    run(root, "one", *COMPARED, epochs=2)


def on_two_ranks(root: Path) -> None:
    run(root, "two", *COMPARED, "zero_stage=2", epochs=2)
    run(root, "three", *COMPARED, *ZERO_3, epochs=2)
    run(root, "three_stopped", *COMPARED, *ZERO_3, epochs=1)
    run(root, "three_stopped", *COMPARED, *ZERO_3, epochs=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    leave = distributed.shutdown
    distributed.shutdown = lambda: None  # deepspeed cannot join a second process group
    (on_two_ranks if os.environ.get("WORLD_SIZE") == "2" else main)(Path(sys.argv[-1]))
    leave()
