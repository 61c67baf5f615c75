"""DeScore, stage 1: the discriminative cold start with random masking of the chain of thought (2605.05922, Eq. 3).

(video A, video B, prompt, CoT A, CoT B, label) -> both CoTs dropped with probability p -> one causal forward of both
sequences -> reward at `<Reward>` -> Bradley-Terry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import faults
from common.distributed import (
    derive_seed,
    gather_objects,
    mean_over_ranks,
    own_batches,
    rank,
    sum_over_ranks,
    world_size,
)
from common.log import say
from rm.data import label_of_total, label_rows
from rm.losses import counted, preference_loss
from rm.masking import dropped_share, mask
from rm.metrics import accuracy_by_dimension, preference_accuracy
from rm.prompt import Encoded, encode_cot
from rm.video import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine
    from rm.config import ColdStartConfig
    from rm.data import Pair, PairDraw, PairSchedule
    from rm.model import DeScore
    from rm.video import PreparedVideo


def backwards_per_step(cfg: ColdStartConfig, ranks: int) -> int:
    """The engine's gradient accumulation. ValueError when ranks and micro-batches do not divide a step evenly."""
    if cfg.pairs_per_step % (ranks * cfg.micro_batch):
        raise ValueError(
            f"cold_start.pairs_per_step={cfg.pairs_per_step} must be a multiple of ranks x micro_batch = "
            f"{ranks} x {cfg.micro_batch}"
        )
    return cfg.pairs_per_step // (ranks * cfg.micro_batch)


@dataclass(frozen=True)
class EncodedSide:
    """One video of a pair and the question about it, ready for the model."""

    video: PreparedVideo
    prompt_ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.video.patches.nbytes + 40 * len(
            self.prompt_ids
        )  # a Python int and the pointer to it


class ColdStart:
    """The state of a run is the model's weights and the engine's; a step is a function of its number.

    engine     must accumulate `backwards_per_step` gradients before it takes a step
    pairs      what ``schedule`` numbers. Without theta give no ties: they would cost a forward and teach nothing
    grad_norm  asked after each optimizer step, if given: the norm before clipping, or None
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
        self.cfg, self.model, self.engine, self.pairs, self.schedule = (
            cfg,
            model,
            engine,
            pairs,
            schedule,
        )
        self.seed, self.grad_norm = seed, grad_norm
        self.accumulation = backwards_per_step(cfg, world_size())
        self.kept: dict[
            tuple[Path, str], EncodedSide
        ] = {}  # the same in every epoch, kept while there is room
        self.room = cfg.cache_gb * 2**30

    def step(self, step: int) -> dict[str, float]:
        """Optimizer step number ``step`` (from 0), on ``pairs_per_step`` pairs over all ranks."""
        start = time.perf_counter()
        draws = self.schedule.at(step)
        # every rank knows all draws
        count_K = (
            counted(
                self.labels([self.pairs[d.row] for d in draws]), theta=self.cfg.theta
            )
            .clamp(min=1)
            .tolist()
        )
        torch.manual_seed(derive_seed(self.seed, "dropout", step, rank()))
        self.model.train()
        sums = {"loss": 0.0, "right": 0.0, "margin": 0.0, "masked": 0.0}
        for part in self.own_parts(draws):
            own = [self.pairs[d.row] for d in part]
            chains = [self.masked(pair, d) for pair, d in zip(own, part, strict=True)]
            faults.point("forward")
            reward_N2K = self.rewards(own, chains)
            label_N = torch.tensor(
                [label_of_total(p, self.model.dimensions) for p in own],
                device=reward_N2K.device,
            )
            loss = preference_loss(
                reward_N2K, self.labels(own).to(reward_N2K.device), weight_K=self.model.loss_weight_K,
                theta=self.cfg.theta, margin=self.cfg.margin, count_K=count_K,
            )  # fmt: skip
            value = loss.detach().item()
            if not math.isfinite(value):
                say(f"the loss is {value} in step {step}")
            # SUM / global count; the engine divides by accumulation and averages over ranks
            faults.point("backward")
            self.engine.backward(loss * (self.accumulation * world_size()))
            faults.point("update")
            self.engine.step()
            total_N2 = self.model.total(reward_N2K.detach())
            signed_N = (total_N2[:, 0] - total_N2[:, 1]) * label_N
            sums["loss"] += value
            sums["right"] += float((signed_N > 0).sum())
            sums["margin"] += float(signed_N.nansum())
            for pair, kept in zip(own, chains, strict=True):
                sums["masked"] += (
                    sum(map(dropped_share, (pair.cot_A, pair.cot_B), kept)) / 2
                )
        labels = [
            label_of_total(self.pairs[d.row], self.model.dimensions) for d in draws
        ]
        decided = max(1, sum(label in (1, -1) for label in labels))
        norm = self.grad_norm() if self.grad_norm is not None else None
        return {
            "train/loss": sum_over_ranks(sums["loss"]),
            "train/accuracy": sum_over_ranks(sums["right"]) / decided,
            "train/margin": sum_over_ranks(sums["margin"]) / decided,
            "train/masked": sum_over_ranks(sums["masked"])
            / len(draws),  # MEAN over videos of the share of text
            **({} if norm is None else {"train/grad_norm": float(norm)}),
            **mean_over_ranks({"seconds/step": time.perf_counter() - start}),
        }

    def labels(self, pairs: Sequence[Pair]) -> Tensor:
        return torch.tensor(label_rows(pairs, self.model.dimensions))

    def own_parts(self, draws: Sequence[PairDraw]) -> list[Sequence[PairDraw]]:
        """This rank's share, in micro-batches."""
        share = len(draws) // world_size()
        own, size = draws[rank() * share : (rank() + 1) * share], self.cfg.micro_batch
        return [own[i : i + size] for i in range(0, share, size)]

    def masked(self, pair: Pair, draw: PairDraw) -> tuple[str, str]:
        """What is left of both chains of thought this time."""
        return mask(
            (pair.cot_A, pair.cot_B),
            self.cfg.masking,
            seed=self.seed,
            epoch=draw.epoch,
            row=draw.row,
        )

    def rewards(
        self, pairs: Sequence[Pair], chains: Sequence[tuple[str, str]]
    ) -> Tensor:
        """(N, 2, K) rewards of A and B with these chains of thought, one forward."""
        encoded: list[Encoded] = []
        videos: list[PreparedVideo] = []
        for pair, both in zip(pairs, chains, strict=True):
            for path, cot in zip((pair.video_A, pair.video_B), both, strict=True):
                side = self.side(path, pair.prompt)
                videos.append(side.video)
                encoded.append(
                    Encoded(
                        side.prompt_ids, tuple(encode_cot(self.model.tokenizer, cot))
                    )
                )
        batch = self.model.batch(encoded, videos).to(self.model.device)
        return self.model(batch).unflatten(0, (-1, 2))

    def side(self, path: Path, prompt: str) -> EncodedSide:
        """Decode, cut and tokenise, unless that was done before and kept."""
        key = (path, prompt)
        if key in self.kept:
            return self.kept[key]
        video = prepare(path, self.model.settings)
        side = EncodedSide(video, self.model.encode(prompt, video).prompt_ids)
        if side.nbytes <= self.room:
            self.kept[key] = side
            self.room -= side.nbytes
        return side

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Preference accuracy on pairs with the chains of thought of the table, never masked; ranks share them."""
        self.model.eval()
        margins: list[tuple[int, list[float]]] = []
        for rows in own_batches(len(pairs), self.cfg.micro_batch):
            part = [pairs[i] for i in rows or [0]]
            reward_N2K = self.rewards(part, [(pair.cot_A, pair.cot_B) for pair in part])
            found = (reward_N2K[:, 0] - reward_N2K[:, 1]).tolist()
            margins += zip(rows, found, strict=False)  # of no rows: none
        margin_of = {
            row: margin_K for part in gather_objects(margins) for row, margin_K in part
        }
        margin_NK = torch.tensor([margin_of[i] for i in range(len(pairs))])
        label_N = torch.tensor(
            [label_of_total(pair, self.model.dimensions) for pair in pairs]
        )
        found = preference_accuracy(self.model.total(margin_NK), label_N)
        return {
            "heldout/accuracy": found.without_ties,
            "heldout/accuracy_with_ties": found.with_ties,
            **accuracy_by_dimension(
                margin_NK, self.labels(pairs), list(self.model.dimensions)
            ),
        }
