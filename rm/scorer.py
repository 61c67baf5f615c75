"""A trained DeScore as a reward model: think, then score, on one copy of the weights and one prefill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.distributed import derive_seed
from common.types import Score
from rm.generate import generate, read_rewards
from rm.model import DeScore
from rm.prompt import DIMENSIONS, parse_answer
from rm.video import PreparedVideo, prepare


class DeScoreScorer:
    """The Protocol `common.types.RewardModel`: one chain of thought a video, then the head.

    batch  videos judged at once
    cot    "generate" writes a chain of thought first; "none" scores at once, which random masking in stage 1 trains too
    """

    name = "descore"

    def __init__(self, model: DeScore, *, batch: int = 32, cot: Literal["generate", "none"] = "generate") -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if cot not in ("generate", "none"):
            raise ValueError(f"cot={cot!r} must be 'generate' or 'none'")
        self.model, self.batch, self.cot = model.eval().requires_grad_(requires_grad=False), batch, cot

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        batch: int = 32,
        cot: Literal["generate", "none"] = "generate",
    ) -> DeScoreScorer:
        """Read a folder that `DeScore.save` wrote; nothing else is needed. Errors as `DeScore.load`.

        device  None is this rank's GPU, or the CPU
        dtype   of the backbone (query and head stay fp32); None is bfloat16 on a GPU and float32 on a CPU
        """
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
        return cls(DeScore.load(path, dtype=getattr(torch, dtype)).to(device), batch=batch, cot=cot)

    @torch.no_grad()
    def score(
        self, videos: Tensor | Sequence[Tensor | str | Path], prompts: Sequence[str], *, fps: float | None = None
    ) -> Score:
        """Rewards (B,): raw logits, only their order and differences mean something.

        videos  uint8 (B, T, Y, X, 3), or a sequence of uint8 (T, Y, X, 3) and of files; frames need ``fps``

        parts   the five sub-dimension scores the chain of thought states, NaN where it states none or N/A
        texts   the chains of thought ("" in score-only mode)

        A chain that is not finished within the checkpoint's token limit is written once more with twice the limit;
        if that is not enough either, its video is not judged: NaN. Raises VideoError naming a file it cannot read.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"score: {len(videos)} videos for {len(prompts)} prompts")
        values, texts = [], []
        for start in range(0, len(prompts), self.batch):
            asked = prompts[start : start + self.batch]
            ready = [prepare(video, self.model.settings, fps=fps) for video in videos[start : start + self.batch]]
            judged = self._judge(asked, ready)
            values.append(judged.value_B)
            texts += judged.texts
        value_B = torch.cat(values) if values else torch.zeros(0)
        return Score(value_B, _parts(texts) if self.cot == "generate" else {}, texts)

    def _judge(self, prompts: Sequence[str], videos: Sequence[PreparedVideo]) -> Score:
        encoded = [self.model.encode(prompt, video) for prompt, video in zip(prompts, videos, strict=True)]
        if self.cot == "none":
            batch = self.model.batch(encoded, videos).to(self.model.device)
            return Score(self.model(batch).cpu(), texts=[""] * len(prompts))
        value_B = torch.full((len(prompts),), math.nan)
        texts = [""] * len(prompts)
        waiting = list(range(len(prompts)))
        for limit in (self.model.generation.max_new_tokens, 2 * self.model.generation.max_new_tokens):
            batch = self.model.batch([encoded[i] for i in waiting], [videos[i] for i in waiting], query=False)
            chains = generate(
                self.model,
                batch,
                replace(self.model.generation, max_new_tokens=limit),
                seeds=self._seeds(prompts, waiting),
            )
            reward_W = read_rewards(self.model, chains).float().cpu()
            for row, i in enumerate(waiting):
                texts[i] = self.model.tokenizer.decode(chains.ids(row))
                if chains.finished_B[row]:
                    value_B[i] = reward_W[row]
            waiting = [i for row, i in enumerate(waiting) if not chains.finished_B[row]]
            if not waiting:
                break
        return Score(value_B, texts=texts)

    def _seeds(self, prompts: Sequence[str], rows: Sequence[int]) -> list[int] | None:
        """By prompt, so that no score depends on a place in the batch; greedy writing takes none."""
        return [derive_seed("score", prompts[i]) for i in rows] if self.model.generation.temperature > 0 else None


def _parts(texts: Sequence[str]) -> dict[str, Tensor]:
    answers = [parse_answer(text) for text in texts]
    return {
        name: torch.tensor([math.nan if a is None or a.scores.get(name) is None else a.scores[name] for a in answers])
        for name in DIMENSIONS
    }
