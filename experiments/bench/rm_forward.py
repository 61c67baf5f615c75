"""What one forward for both objectives of dual RL saves: `python experiments/bench/rm_forward.py`.

Three ways to get the policy's and the head's gradients of G chains of thought about each video:

    two      two forwards of every chain, with `<Reward>` and without (the official release)
    one      one forward of every chain, prompt and video each time
    packed   one forward of all G chains behind one prompt (what `rm.dual_rl` does)

Gradients are compared in fp64, wall time in fp32, alternating; ratios are of medians. Writes
`docs/results/rm_forward.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.log import say
from launch.compose import quiet
from rm.config import BackboneLora, LearningRates
from rm.model import DeScore
from rm.packed import PackedCot, pack, packed_forward, token_log_probs
from rm.prompt import Encoded
from rm.video import prepare
from toy.world import FPS, caption, random_attributes, random_scene, render


class Work:
    """Videos of the embedded world, G chains about each, and a number that weighs every chain."""

    def __init__(
        self,
        base: str,
        *,
        videos: int,
        group_size: int,
        tokens: int,
        dtype: torch.dtype,
    ) -> None:
        rng = random.Random(0)
        scenes = [random_scene(random_attributes(rng), rng) for _ in range(videos)]
        self.model = DeScore.from_base(base).to(dtype)
        self.model.param_groups(
            LearningRates(llm=1e-4, vision=0.0, merger=0.0),
            lora=BackboneLora(16, 32.0, 0.0),
            weight_decay=0.0,
        )
        frames = render(scenes, frames=8)
        self.videos = [prepare(video, self.model.settings, fps=FPS) for video in frames]
        prompts = [caption(scene.attributes, wording=0) for scene in scenes]
        self.encoded = [
            self.model.encode(p, v) for p, v in zip(prompts, self.videos, strict=True)
        ]
        allowed = [
            i
            for i in range(200)
            if not self.model.banned_ids()[i] and i != self.model.end_id
        ]

        def chain() -> PackedCot:
            size = tokens - rng.randrange(tokens // 4)
            return PackedCot(
                tuple(rng.choice(allowed) for _ in range(size)), finished=True
            )

        self.chains = [[chain() for _ in range(group_size)] for _ in range(videos)]
        self.weight_BG = torch.randn(
            videos, group_size, generator=torch.Generator().manual_seed(0)
        ).to(dtype)

    def objective(self, log_prob_BGT: Tensor, reward_BG: Tensor) -> Tensor:
        return (self.weight_BG * (log_prob_BGT.sum(-1) + reward_BG)).sum()

    def packed(self) -> Tensor:
        judged = packed_forward(
            self.model,
            pack(self.model, self.encoded, self.videos, self.chains),
            temperature=1.0,
        )
        return self.objective(judged.log_prob_BGT, judged.reward_BGK[..., 0])

    def repeated(self) -> tuple[list, list, list]:
        pairs = [
            (e, v, c)
            for e, v, own in zip(self.encoded, self.videos, self.chains, strict=True)
            for c in own
        ]
        return tuple(map(list, zip(*pairs, strict=True)))

    def one(self) -> Tensor:
        encoded, videos, chains = self.repeated()
        judged = packed_forward(
            self.model,
            pack(self.model, encoded, videos, [[c] for c in chains]),
            temperature=1.0,
        )
        shape = self.weight_BG.shape
        return self.objective(
            judged.log_prob_BGT.reshape(*shape, -1),
            judged.reward_BGK[..., 0].reshape(shape),
        )

    def two(self) -> Tensor:
        encoded, videos, chains = self.repeated()
        sequences = [
            Encoded(e.prompt_ids, c.ids) for e, c in zip(encoded, chains, strict=True)
        ]
        reward_BG = self.model(self.model.batch(sequences, videos)).view_as(
            self.weight_BG
        )
        hidden_BLD = self.model.hidden(self.model.batch(sequences, videos, query=False))
        rows, targets, owner = [], [], []
        for i, sequence in enumerate(sequences):
            start, end = len(sequence.prompt_ids) - 1, len(sequence.ids)
            rows.append(hidden_BLD[i, start:end])
            targets += [*sequence.cot_ids, self.model.end_id]
            owner += [i] * (end - start)
        log_prob_N = token_log_probs(
            self.model, torch.cat(rows), torch.tensor(targets), temperature=1.0
        )
        weight_N = self.weight_BG.flatten()[torch.tensor(owner)]
        return (weight_N * log_prob_N).sum() + (self.weight_BG * reward_BG).sum()

    def gradients(self, way: Callable[[], Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                way(), [p for p in self.model.parameters() if p.requires_grad]
            )
        )


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest gradient of all."""
    top = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="assets/shapes/qwen")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/rm_forward.json")
    )
    args = parser.parse_args()
    quiet()
    sizes = {"group_size": args.group_size, "tokens": args.tokens}
    exact = Work(args.base, videos=2, dtype=torch.float64, **sizes)
    reference = exact.gradients(exact.two)
    error = {
        way: worst(exact.gradients(getattr(exact, way)), reference)
        for way in ("one", "packed")
    }

    work = Work(args.base, videos=args.videos, dtype=torch.float32, **sizes)
    ways = ("two", "one", "packed")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(args.rounds + 1):
        for way in ways:
            start = time.perf_counter()
            work.gradients(getattr(work, way))
            if round_number:  # the first one warms up
                seconds[way].append(time.perf_counter() - start)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    result = {
        "command": "python experiments/bench/rm_forward.py",
        "prompt_tokens": len(work.encoded[0].prompt_ids),
        "chain_tokens": args.tokens,
        "group_size": args.group_size,
        "relative_gradient_error_fp64": error,
        "seconds": median,
        "ratio_to_two": {way: median[way] / median["two"] for way in ("one", "packed")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
