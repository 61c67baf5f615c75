"""Data and a reward model for runs of launch/dual_rl.py."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from common.video_io import write_mp4
from rm.config import BackboneLora, Generation, LearningRates
from rm.model import DeScore
from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, tiny_qwen, tiny_tokenizer

ANSWER = (
    '<answer>{"video_1_scores": {"subject": "2"}, '
    '"video_2_scores": {"subject": "0"}}</answer>'
)


def write_pairs_table(folder: Path) -> None:
    """Write four pairs with answers, one of them a tie."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["videos", "prompt", "GSB", "answer"])
        writer.writeheader()
        for i, label in enumerate(["A", "B", "same", "B"]):
            names = [f"{i}{side}.mp4" for side in "AB"]
            for side, name in enumerate(names):
                write_mp4(folder / name, random_frames(10 * i + side), 4.0)
            writer.writerow(
                {
                    "videos": repr(names),
                    "prompt": f"p{i}",
                    "GSB": label,
                    "answer": ANSWER,
                }
            )


def write_reward_model(folder: Path) -> None:
    """Write a random reward model of stage 1."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        how = Generation(max_new_tokens=6, repetition_penalty=1.0)
        model = DeScore(
            tiny_qwen(tied=False),
            tiny_tokenizer(),
            TEMPLATE,
            SETTINGS,
            query_id=264,
            generation=how,
        )
        # the end of the turn is likely in some states: CoTs of every length, 1 to 6 tokens
        torch.nn.init.normal_(model.backbone.lm_head.weight.data[model.end_id], std=1.5)
        model.save(folder)


@torch.no_grad()
def write_bf16_reward_model(folder: Path) -> None:
    """Write what a bfloat16 stage 1 leaves: the reward model above with an adapter apart."""
    write_reward_model(folder)
    model = DeScore.load(folder, dtype=torch.bfloat16)
    lora = BackboneLora(rank=4, alpha=8.0, dropout=0.0)
    model.param_groups(LearningRates(), lora=lora, weight_decay=0.0)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save(folder)
