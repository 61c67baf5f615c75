"""Stage 1 of DeScore: cold start of the reward head on preference pairs.

DeScore (arXiv 2605.05922), equation 3. A step takes pairs of videos with a chain of thought
(CoT) each, drops CoTs at random (`rm.masking`), computes the reward of both videos in one
causal forward, and takes an optimizer step on the Bradley-Terry loss of the rewards.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import faults, progress
from common.distributed import (
    derive_seed,
    mean_over_ranks,
    rank,
    rank_batches,
)
from common.log import say
from common.updates import (
    all_ranks,
    backward_and_step,
    rank_micro_batches,
)
from rm.data import label_rows
from rm.losses import counted, preference_loss
from rm.masking import dropped_share, mask
from rm.metrics import gather_in_order, heldout_metrics, total_labels
from rm.prompt import Encoded, encode_cot
from rm.video import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine
    from rm.config import ColdStartConfig
    from rm.data import Pair, PairDraw, PairSchedule
    from rm.model import DeScore
    from rm.video import PreparedVideo


# Memory of a token id in a tuple: a Python int and the pointer to it.
BYTES_PER_TOKEN_ID = 40


@dataclass
class ColdStart:
    """The training loop of stage 1; its only state is the weights and the engine.

    engine     The engine; it accumulates the gradients of an optimizer step.
    pairs      The pairs that ``schedule`` numbers. Without theta they should hold no ties,
               which would cost a forward and teach nothing.
    grad_norm  Returns the gradient norm before clipping, or None; called after each step.
    """

    cfg: ColdStartConfig
    model: DeScore
    engine: Engine
    pairs: Sequence[Pair]
    schedule: PairSchedule
    seed: int
    grad_norm: Callable[[], float | Tensor | None] = lambda: None

    def __post_init__(self) -> None:
        # The checkpoint tells whoever scores with it whether it knows CoTs.
        self.model.cot_in_training = self.cfg.masking.cot_in_training
        # Prepared videos are the same in every epoch, so they are cached while there is room.
        self.cache: dict[tuple[Path, str], tuple[PreparedVideo, tuple[int, ...]]] = {}
        self.cache_room = self.cfg.cache_gb * 2**30

    def step(self, step: int) -> dict[str, float]:
        """Take optimizer step number ``step`` (from 0) on ``pairs_per_step`` pairs."""
        start = time.perf_counter()
        draws = self.schedule.at(step)

        # 1. Every rank knows all draws, so divisors need no communication.
        pairs = [self.pairs[draw.row] for draw in draws]
        label_NK = torch.tensor(label_rows(pairs, self.model.dimensions))
        count_K = counted(label_NK, theta=self.cfg.theta).clamp(min=1).tolist()
        label_N = total_labels(pairs, self.model.dimensions)
        decided = int((label_N.abs() == 1).sum())
        decided = max(1, decided)

        # 2. One backward per micro-batch; the engine takes the optimizer step on the last one.
        torch.manual_seed(derive_seed(self.seed, "dropout", step, rank()))
        self.model.train()
        rank_sums: dict[str, float] = defaultdict(float)
        for micro_batch in rank_micro_batches(draws, self.cfg.micro_batch):
            self.micro_step(
                micro_batch,
                count_K,
                rank_sums,
                step,
            )

        # 3. Metrics over all ranks; accuracy and margin are MEANS over decided pairs.
        sums = all_ranks(rank_sums)
        metrics = {
            "train/loss": sums["loss"],
            "train/accuracy": sums["correct"] / decided,
            "train/margin": sums["margin"] / decided,
            # MEAN over videos of the share of the text that was dropped
            "train/masked": sums["masked"] / len(draws),
        }
        norm = self.grad_norm()
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        seconds = {"seconds/step": time.perf_counter() - start}
        return {**metrics, **mean_over_ranks(seconds)}

    def micro_step(
        self,
        draws: Sequence[PairDraw],
        count_K: Sequence[float],
        sums: dict[str, float],
        step: int,
    ) -> None:
        """Compute the loss of a micro-batch, run backward, and add its metrics to ``sums``."""
        # Drop CoTs at random, then compute the rewards of both videos in one forward.
        cfg = self.cfg
        pairs = [self.pairs[draw.row] for draw in draws]
        cots = [self.masked(draw) for draw in draws]
        faults.point("forward")
        reward_N2K = self.rewards(pairs, cots)

        # Bradley-Terry: SUM over this micro-batch / count over all ranks and micro-batches.
        device = reward_N2K.device
        loss = preference_loss(
            reward_N2K,
            torch.tensor(label_rows(pairs, self.model.dimensions), device=device),
            weight_K=self.model.loss_weight_K,
            count_K=count_K,
            theta=cfg.theta,
            margin=cfg.margin,
        )
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            say(f"the loss is {loss_value} in step {step}")
        # The loss is a part of the step's SUM: undo the engine's average over all backwards.
        backwards = cfg.pairs_per_step // cfg.micro_batch
        backward_and_step(self.engine, loss * backwards)

        # The margin is positive where the reward prefers the video that people chose.
        label_N = total_labels(pairs, self.model.dimensions).to(device)
        total_N2 = self.model.total(reward_N2K.detach())
        margin_N = (total_N2[:, 0] - total_N2[:, 1]) * label_N
        sums["loss"] += loss_value
        sums["correct"] += float((margin_N > 0).sum())
        sums["margin"] += float(margin_N.nansum())
        for pair, (rest_A, rest_B) in zip(pairs, cots, strict=True):
            dropped_A = dropped_share(pair.cot_A, rest_A)
            dropped_B = dropped_share(pair.cot_B, rest_B)
            sums["masked"] += (dropped_A + dropped_B) / 2

    def masked(self, draw: PairDraw) -> tuple[str, str]:
        """Both CoTs of a pair after random masking."""
        pair = self.pairs[draw.row]
        return mask(
            (pair.cot_A, pair.cot_B),
            self.cfg.masking,
            seed=self.seed,
            epoch=draw.epoch,
            row=draw.row,
        )

    def rewards(self, pairs: Sequence[Pair], cots: Sequence[tuple[str, str]]) -> Tensor:
        """Rewards (N, 2, K) of videos A and B with these CoTs; one forward."""
        encoded: list[Encoded] = []
        videos: list[PreparedVideo] = []
        for pair, (cot_A, cot_B) in zip(pairs, cots, strict=True):
            for path, cot in ((pair.video_A, cot_A), (pair.video_B, cot_B)):
                video, prompt_ids = self.prepared(path, pair.prompt)
                cot_ids = tuple(encode_cot(self.model.tokenizer, cot))
                encoded.append(Encoded(prompt_ids, cot_ids))
                videos.append(video)
        batch = self.model.batch(encoded, videos).to(self.model.device)
        progress.tick()
        return self.model(batch).unflatten(0, (-1, 2))

    def prepared(
        self, path: Path, prompt: str
    ) -> tuple[PreparedVideo, tuple[int, ...]]:
        """Decode a video and tokenise the instruction about it, or take both from the cache."""
        key = (path, prompt)
        if key in self.cache:
            return self.cache[key]

        # Prepare the video, and keep it while there is room.
        video = prepare(path, self.model.settings)
        prompt_ids = self.model.encode(prompt, video).prompt_ids
        size = video.patches.nbytes + BYTES_PER_TOKEN_ID * len(prompt_ids)
        if size <= self.cache_room:
            self.cache[key] = (video, prompt_ids)
            self.cache_room -= size
        return video, prompt_ids

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Measure preference accuracy on held-out pairs with the table's CoTs, unmasked.

        The ranks share the pairs.
        """
        self.model.eval()
        margins: list[tuple[int, list[float]]] = []
        for rows in rank_batches(len(pairs), self.cfg.micro_batch):
            # A sharded model needs equally many forwards on every rank: pad an empty batch.
            batch = [pairs[i] for i in rows or [0]]
            cots = [(pair.cot_A, pair.cot_B) for pair in batch]
            reward_N2K = self.rewards(batch, cots)
            margin_NK = reward_N2K[:, 0] - reward_N2K[:, 1]
            margins += zip(
                rows,
                margin_NK.tolist(),
                strict=False,
            )

        # Margins of all ranks in the order of the pairs.
        ordered = [margin_K for _, margin_K in gather_in_order(margins)]
        margin_NK = torch.tensor(ordered)
        return heldout_metrics(self.model, margin_NK, pairs, with_ties=True)
