"""Stage 1 of DeScore: cold start of the reward head on preference pairs.

DeScore (arXiv 2605.05922), equation 3. A step takes pairs of videos with a chain of thought
(CoT) each, drops CoTs at random (`rm.masking`), computes the reward of both videos in one
causal forward, and takes an optimizer step on the Bradley-Terry loss of the rewards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import faults, progress
from common.distributed import (
    derive_seed,
    gather_objects,
    mean_over_ranks,
    rank,
    rank_batches,
    sum_over_ranks,
    world_size,
)
from common.log import say
from rm.data import label_of_total, label_rows
from rm.losses import counted, preference_loss
from rm.masking import dropped_share, mask
from rm.metrics import heldout_metrics
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


def backwards_per_step(cfg: ColdStartConfig, ranks: int) -> int:
    """Compute the engine's gradient accumulation.

    Raises ValueError if ranks and micro-batches do not divide a step evenly.
    """
    pairs_per_backward = ranks * cfg.micro_batch
    if cfg.pairs_per_step % pairs_per_backward:
        raise ValueError(
            f"cold_start.pairs_per_step={cfg.pairs_per_step} must be a multiple of "
            f"ranks x micro_batch = {ranks} x {cfg.micro_batch}"
        )
    return cfg.pairs_per_step // pairs_per_backward


@dataclass(frozen=True)
class EncodedVideo:
    """A prepared video and the token ids of the instruction about it."""

    video: PreparedVideo
    prompt_ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        id_bytes = BYTES_PER_TOKEN_ID * len(self.prompt_ids)
        return self.video.patches.nbytes + id_bytes


class ColdStart:
    """The training loop of stage 1; its only state is the weights and the engine.

    engine     The engine; it accumulates `backwards_per_step` gradients per optimizer step.
    pairs      The pairs that ``schedule`` numbers. Without theta they should hold no ties,
               which would cost a forward and teach nothing.
    grad_norm  Returns the gradient norm before clipping, or None; called after each step.
    """

    def __init__(
        self,
        cfg: ColdStartConfig,
        *,
        model: DeScore,
        engine: Engine,
        pairs: Sequence[Pair],
        schedule: PairSchedule,
        seed: int,
        grad_norm: Callable[[], float | Tensor | None] | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.engine = engine
        self.pairs = pairs
        self.schedule = schedule
        self.seed = seed
        self.grad_norm = grad_norm
        self.accumulation = backwards_per_step(cfg, world_size())
        # Encoded videos are the same in every epoch, so they are cached while there is room.
        self.cache: dict[tuple[Path, str], EncodedVideo] = {}
        self.cache_room = cfg.cache_gb * 2**30

    def step(self, step: int) -> dict[str, float]:
        """Take optimizer step number ``step`` (from 0) on ``pairs_per_step`` pairs."""
        start = time.perf_counter()
        draws = self.schedule.at(step)

        # 1. Every rank knows all draws, so the divisor of the loss needs no communication.
        label_NK = self.labels([self.pairs[draw.row] for draw in draws])
        count_K = counted(label_NK, theta=self.cfg.theta).clamp(min=1).tolist()

        # 2. One backward per micro-batch; the engine takes the optimizer step on the last one.
        torch.manual_seed(derive_seed(self.seed, "dropout", step, rank()))
        self.model.train()
        sums = {"loss": 0.0, "correct": 0.0, "margin": 0.0, "masked": 0.0}
        for micro_batch in self.micro_batches(draws):
            self.micro_step(micro_batch, count_K, sums, step)

        # 3. Metrics over all ranks; accuracy and margin are MEANS over decided pairs.
        decided = 0
        for draw in draws:
            label = label_of_total(self.pairs[draw.row], self.model.dimensions)
            decided += label in (1, -1)
        decided = max(1, decided)
        metrics = {
            "train/loss": sum_over_ranks(sums["loss"]),
            "train/accuracy": sum_over_ranks(sums["correct"]) / decided,
            "train/margin": sum_over_ranks(sums["margin"]) / decided,
            # MEAN over videos of the share of the text that was dropped
            "train/masked": sum_over_ranks(sums["masked"]) / len(draws),
        }
        norm = self.grad_norm() if self.grad_norm is not None else None
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
        pairs = [self.pairs[draw.row] for draw in draws]

        # Drop CoTs at random, then compute the rewards of both videos in one forward.
        cots = []
        for pair, draw in zip(pairs, draws, strict=True):
            cots.append(self.masked(pair, draw))
        faults.point("forward")
        reward_N2K = self.rewards(pairs, cots)

        # Bradley-Terry: SUM over this micro-batch / count over all ranks and micro-batches.
        loss = preference_loss(
            reward_N2K,
            self.labels(pairs).to(reward_N2K.device),
            weight_K=self.model.loss_weight_K,
            theta=self.cfg.theta,
            margin=self.cfg.margin,
            count_K=count_K,
        )
        loss_value = loss.detach().item()
        if not math.isfinite(loss_value):
            say(f"the loss is {loss_value} in step {step}")

        # The engine divides by its accumulation and averages over ranks; undo both.
        faults.point("backward")
        self.engine.backward(loss * (self.accumulation * world_size()))
        faults.point("update")
        self.engine.step()

        # The margin is positive where the reward prefers the video that people chose.
        label_N = self.total_labels(pairs).to(reward_N2K.device)
        total_N2 = self.model.total(reward_N2K.detach())
        margin_N = (total_N2[:, 0] - total_N2[:, 1]) * label_N
        sums["loss"] += loss_value
        sums["correct"] += float((margin_N > 0).sum())
        sums["margin"] += float(margin_N.nansum())
        for pair, (rest_A, rest_B) in zip(pairs, cots, strict=True):
            dropped_A = dropped_share(pair.cot_A, rest_A)
            dropped_B = dropped_share(pair.cot_B, rest_B)
            sums["masked"] += (dropped_A + dropped_B) / 2

    def labels(self, pairs: Sequence[Pair]) -> Tensor:
        """Labels (N, K) of the pairs in each dimension, see `Pair.label_in`."""
        return torch.tensor(label_rows(pairs, self.model.dimensions))

    def total_labels(self, pairs: Sequence[Pair]) -> Tensor:
        """Labels (N,) that the summed reward is compared with."""
        names = self.model.dimensions
        return torch.tensor([label_of_total(pair, names) for pair in pairs])

    def micro_batches(self, draws: Sequence[PairDraw]) -> list[Sequence[PairDraw]]:
        """Cut this rank's share of a step into micro-batches."""
        share = len(draws) // world_size()
        first = rank() * share
        rank_draws = draws[first : first + share]
        size = self.cfg.micro_batch
        return [rank_draws[i : i + size] for i in range(0, share, size)]

    def masked(self, pair: Pair, draw: PairDraw) -> tuple[str, str]:
        """Both CoTs of a pair after random masking."""
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
            sides = ((pair.video_A, cot_A), (pair.video_B, cot_B))
            for path, cot in sides:
                item = self.encoded_video(path, pair.prompt)
                cot_ids = tuple(encode_cot(self.model.tokenizer, cot))
                encoded.append(Encoded(item.prompt_ids, cot_ids))
                videos.append(item.video)
        batch = self.model.batch(encoded, videos).to(self.model.device)
        progress.tick()
        return self.model(batch).unflatten(0, (-1, 2))

    def encoded_video(self, path: Path, prompt: str) -> EncodedVideo:
        """Decode a video and tokenise its prompt, or take both from the cache."""
        key = (path, prompt)
        if key in self.cache:
            return self.cache[key]

        # Prepare the video, and keep it while there is room.
        video = prepare(path, self.model.settings)
        item = EncodedVideo(video, self.model.encode(prompt, video).prompt_ids)
        if item.nbytes <= self.cache_room:
            self.cache[key] = item
            self.cache_room -= item.nbytes
        return item

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
            for i, row in enumerate(rows):
                margins.append((row, margin_NK[i].tolist()))

        # Put the margins of all ranks into the order of the pairs.
        margin_of = {}
        for rank_margins in gather_objects(margins):
            margin_of.update(rank_margins)
        margin_NK = torch.tensor([margin_of[i] for i in range(len(pairs))])
        return heldout_metrics(self.model, margin_NK, pairs, with_ties=True)
