"""Run folders as the commands leave them, and the page that launch/report.py makes of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from common.video_io import write_mp4
from launch import report
from launch.evaluation.intervals import mean_ci95

EVIL = '<script>alert(1)</script> {{ 7 * 7 }} & "quotes" \x00'
BASE, TUNED = [0.2, 0.4, 0.6, 0.4], [0.5, 0.6, 0.7, 0.8]  # the oracle, prompt by prompt


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.script = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        # a script and a style hold no other tags
        if self.inside == "script":
            self.script += data
        elif self.inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def clip(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, torch.full((5, 16, 16, 3), grey, dtype=torch.uint8), 8.0)


def evaluation(
    folder: Path, values: list[float], *, seed: int = 0, adapter: str | None = None
) -> Path:
    """Four prompts, the first one malicious; videos of the first two."""
    rows = []
    for i, value in enumerate(values):
        video = f"videos/{i:04d}.mp4" if i < 2 else None
        if video:
            clip(folder / video, 40 * (i + 1))
        rows.append(
            {
                "index": i,
                "prompt": EVIL if i == 0 else f"prompt number {i}",
                "seed": seed + i,
                "rewards": {"shapes": value, "descore": None if i == 3 else 10 * value},
                "parts": {"shapes": {"subject": 2 * value}},
                "texts": {"descore": f"I think {EVIL}"},
                "video": video,
            }
        )
    lines(folder / "results.jsonl", rows)
    columns = {"shapes": values, "descore": [*(10 * v for v in values[:3]), None]}
    columns["shapes.subject"] = [2 * v for v in values]
    summary = {
        name: mean_ci95(column, seed=0).as_dict() for name, column in columns.items()
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    trained = "null" if adapter is None else adapter
    (folder / "config.yaml").write_text(
        f"seed: 0\nsecret_token: '***'\nadapter: {trained}\n"
    )
    return folder


def alignment_run(folder: Path) -> Path:
    """Forty steps of two rewards, and samples of the first and last."""
    rows = []
    for step in range(40):
        row: dict[str, Any] = {
            "step": step,
            "train/kl": 0.001 * step,
            "train/grad_norm": 1.0,
        }
        row |= {
            "train/ratio_max_dev": 1e-7,
            "seconds/step": 2.0,
            "seconds/rollout": 1.5,
        }
        for name in ("descore", "shapes"):
            row |= {
                f"reward/{name}": 0.1 * step,
                f"reward/{name}_std": 0.5,
                f"reward/{name}_zero_spread": 0.0,
            }
        rows.append(row)
    lines(folder / "metrics.jsonl", rows)
    (folder / "config.yaml").write_text(
        "grpo: {}\nrewards:\n  descore: {weight: 1.0}\n  shapes: {weight: 0}\n"
    )
    for step in (0, 39):
        samples = [
            {
                "file": f"{m:04d}.mp4",
                "step": step,
                "prompt": "a group",
                "seed": 3,
                "member": m,
                "advantage": a,
            }
            | {
                "rewards": {"descore": 1.0 + a},
                "parts": {},
                "texts": {"descore": "chain"},
            }
            for m, a in enumerate((-0.25, 0.75, -0.5))
        ]
        lines(folder / "samples" / f"step-{step:06d}" / "samples.jsonl", samples)
        for m in range(3):
            clip(folder / "samples" / f"step-{step:06d}" / f"{m:04d}.mp4", 60)
    return folder


def make_demo(root: Path) -> Path:
    """Make a folder as `experiments/demo.py` leaves it."""
    evaluation(root / "eval_base", BASE)
    evaluation(root / "eval_tuned", TUNED, adapter="runs/demo/grpo/final")
    alignment_run(root / "grpo")
    rows = [
        {
            "step": s,
            "train/loss": 0.7 / (s + 1),
            "train/accuracy": 0.5,
            "train/margin": 0.1 * s,
        }
        for s in range(9)
    ]
    rows[8]["heldout/accuracy"] = 0.9
    lines(root / "descore" / "metrics.jsonl", rows)
    (root / "descore" / "config.yaml").write_text("cold_start: {}\n")
    clip(root / "data" / "a.mp4", 10)
    pair = {
        "prompt": "which one?",
        "video_A": "../data/a.mp4",
        "video_B": "../data/gone.mp4",
        "cot_A": "<b>A</b>",
    }
    margins = [(1, 1.0), (1, -3.0), (0, 0.1)]
    rows = [
        {
            **pair,
            "index": i,
            "label": label,
            "reward_A": margin,
            "reward_B": 0.0,
            "cot_B": "B",
        }
        for i, (label, margin) in enumerate(margins)
    ]
    lines(root / "eval_rm" / "results.jsonl", rows)
    accuracy = mean_ci95([1.0, 0.0], seed=0).as_dict()
    summary = {
        "without_ties": accuracy,
        "with_ties": accuracy,
        "threshold": 0.1,
        "pairs": 3,
        "ties": 1,
        "unjudged": 0,
    }
    (root / "eval_rm" / "summary.json").write_text(json.dumps(summary))
    return root


def rendered(folder: Path, *words: str) -> tuple[str, Page]:
    report.main([str(folder), "--out", str(folder / "report.html"), *words])
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)
