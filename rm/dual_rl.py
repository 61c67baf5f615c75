"""Stage 2 of DeScore: dual-objective reinforcement learning.

DeScore (arXiv 2605.05922), equations 7 and 10. The model samples G chains of thought (CoTs)
for each video of a preference pair, and rules reward them (`rm.text_rewards`). One forward
of ``[prompt, video][CoT_1 <Reward>] ... [CoT_G <Reward>]`` per video gives both objectives:

    L = SUM_tokens [ -min(r A, clip(r) A) + kl_weight k3 ] / tokens
      + bt_weight SUM_decided [ -log sig(r_chosen - r_rejected) ] / decided

with tokens and decided (pair, rollout) counted over ALL ranks and micro-batches of an update.
Bradley-Terry compares rollout i of video A with rollout i of video B.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from common.lora import adapters_off
from common.policy_gradient import group_advantages, k3_kl, masked_mean, token_surrogate
from rm.config import Generation
from rm.cot_rollout import (
    Rollouts,
    SampledPair,
    encode_pairs,
    generate_cots,
    pack_pairs,
    reward_cot,
    reward_pair,
)
from rm.data import label_rows
from rm.generate import generate, rewards_from_cache
from rm.losses import counted, preference_loss
from rm.metrics import heldout_metrics
from rm.packed import Packed, PackedCot, packed_forward

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine
    from rm.config import DualRlConfig
    from rm.data import Pair, PairSchedule
    from rm.model import DeScore
    from rm.text_rewards import RuleRewardConfig

# Added to the standard deviation of a group.
EPS = 1e-6
REWARD_PARTS = ("total", "quality", "format", "length", "preference")
LOSS_SUMS = (
    "loss",
    "policy",
    "kl",
    "bt",
    "correct",
    "decided",
    "ratio",
    "clipped",
)


def backwards_per_update(cfg: DualRlConfig, ranks: int) -> int:
    """Compute the engine's gradient accumulation.

    Raises ValueError if ranks and micro-batches do not divide an update evenly.
    """
    pairs_per_backward = ranks * cfg.micro_batch
    if cfg.pairs_per_update % pairs_per_backward:
        raise ValueError(
            f"dual_rl.pairs_per_update={cfg.pairs_per_update} must be a multiple of "
            f"ranks x micro_batch = {ranks} x {cfg.micro_batch}"
        )
    return cfg.pairs_per_update // pairs_per_backward


@dataclass(frozen=True)
class DualLoss:
    """The loss of a micro-batch, and its SUMS for metrics by name."""

    loss: Tensor
    sums: dict[str, float]


@dataclass(frozen=True)
class HeldoutPair:
    """What a held-out pair gave: r_A - r_B by dimension, and means over both CoTs."""

    row: int
    margin_K: list[float]
    quality: float
    finished: float


class DualRl:
    """The training loop of stage 2; its only state is the weights and the engine.

    engine      The engine; it accumulates `backwards_per_update` gradients per optimizer step.
    reference   The frozen stage-1 model. None: ``model`` with its adapters switched off.
    grad_norms  Returns gradient norms before clipping by part of the model; called after
                each optimizer step.
    """

    def __init__(
        self,
        cfg: DualRlConfig,
        *,
        rules: RuleRewardConfig,
        model: DeScore,
        engine: Engine,
        pairs: Sequence[Pair],
        schedule: PairSchedule,
        seed: int,
        reference: DeScore | None = None,
        grad_norms: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.cfg = cfg
        self.rules = rules
        self.model = model
        self.engine = engine
        self.pairs = pairs
        self.schedule = schedule
        self.seed = seed
        self.reference = reference
        self.grad_norms = grad_norms
        self.accumulation = backwards_per_update(cfg, world_size())

    def step(self, step: int) -> dict[str, float]:
        """Sample and reward ``pairs_per_step`` pairs, then make all updates on them."""
        start = time.perf_counter()
        updates = self.micro_batches(step)

        # 1. Sample G CoTs for both videos of every pair, with the current policy.
        rows = []
        for update in updates:
            for micro_batch in update:
                rows += micro_batch
        sampled = iter(self.sample(rows, step))

        # 2. Reward the CoTs and normalise the rewards within each group.
        faults.point("reward")
        rollouts = []
        for update in updates:
            parts = []
            for micro_batch in update:
                parts.append(self.rollouts([next(sampled) for _ in micro_batch]))
            rollouts.append(parts)
        sampling_done = time.perf_counter()

        # 3. One optimizer step per update: GRPO on the CoTs, Bradley-Terry on the rewards.
        update_metrics = [self.update(parts) for parts in rollouts]
        update_done = time.perf_counter()

        # 4. Metrics: MEANS over the CoTs of the step, and over its updates.
        metrics = self.rollout_metrics([part for parts in rollouts for part in parts])
        for name in update_metrics[0]:
            total = sum(values[name] for values in update_metrics)
            metrics[name] = total / len(update_metrics)
        seconds = {
            "seconds/rollout": sampling_done - start,
            "seconds/update": update_done - sampling_done,
            "seconds/step": update_done - start,
        }
        return {**metrics, **mean_over_ranks(seconds)}

    def micro_batches(self, step: int) -> list[list[list[int]]]:
        """Rows of the table for this rank, [update][micro-batch].

        The pairs of an update do not depend on the number of ranks.
        """
        rows = [draw.row for draw in self.schedule.at(step)]
        share = self.cfg.pairs_per_update // world_size()
        size = self.cfg.micro_batch
        # Every rank takes its share of each update.
        updates = []
        for update_start in range(0, len(rows), self.cfg.pairs_per_update):
            first = update_start + rank() * share
            rank_rows = rows[first : first + share]
            updates.append([rank_rows[i : i + size] for i in range(0, share, size)])
        return updates

    # ------------------------------------------------------------------ sampling and rewards

    @torch.no_grad()
    def sample(self, rows: Sequence[int], step: int) -> list[SampledPair]:
        """Sample G CoTs for both videos of every pair."""
        self.model.eval()
        cfg = self.cfg
        pairs = [self.pairs[row] for row in rows]
        videos, encoded = encode_pairs(self.model, pairs)

        # A seed depends on the row of the table, not on batches or ranks.
        seeds = []
        for row in rows:
            for side in range(2):
                for i in range(cfg.group_size):
                    seeds.append(derive_seed(self.seed, "rollout", step, row, side, i))

        # Both videos of each pair of a micro-batch go through the model together.
        faults.point("chains")
        how = Generation(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            repetition_penalty=1.0,
        )
        cots = generate_cots(
            self.model,
            encoded,
            videos,
            how,
            seeds=seeds,
            batch=2 * cfg.micro_batch,
        )

        # Two sequences in a row are the sides of a pair.
        sampled = []
        for n, pair in enumerate(pairs):
            sides = slice(2 * n, 2 * n + 2)
            item = SampledPair(
                pair=pair,
                videos=videos[sides],
                encoded=encoded[sides],
                cots=cots[sides],
            )
            sampled.append(item)
        return sampled

    @torch.no_grad()
    def rollouts(self, sampled: Sequence[SampledPair]) -> Rollouts:
        """Reward the CoTs of a micro-batch, and compute the log-probabilities GRPO needs."""
        self.model.eval()
        progress.enter("score")
        progress.tick()
        cfg = self.cfg
        device = self.model.device

        # Rule rewards, and advantages relative to the G CoTs of the same video.
        rules = [reward_pair(self.model, item, self.rules) for item in sampled]
        totals = [[[rule.total for rule in group] for group in pair] for pair in rules]
        reward_N2G = torch.tensor(totals)
        advantage_VG = group_advantages(
            reward_N2G.flatten(0, 1),
            scale="group",
            eps=EPS,
        )

        # With several updates per step, the weights move away from those that sampled.
        packed = pack_pairs(self.model, sampled, cfg.cots_per_row).to(device)
        old_BGT = None
        if cfg.pairs_per_step > cfg.pairs_per_update:
            old_BGT = self.log_probs(self.model, packed)
        reference_BGT = None
        if cfg.kl_weight > 0:
            reference_BGT = self.reference_log_probs(packed)

        # Labels, and which CoTs ended by themselves.
        labels = label_rows([item.pair for item in sampled], self.model.dimensions)
        finished = []
        for item in sampled:
            finished.append([[cot.finished for cot in group] for group in item.cots])
        return Rollouts(
            packed=packed,
            label_NK=torch.tensor(labels, device=device),
            advantage_N2G=advantage_VG.view_as(reward_N2G).to(device),
            rules=rules,
            finished_N2G=torch.tensor(finished),
            old_BGT=old_BGT,
            reference_BGT=reference_BGT,
        )

    def log_probs(self, model: DeScore, packed: Packed) -> Tensor:
        """Log-probabilities (B, G, T) of the CoTs under a model."""
        output = packed_forward(
            model, packed, temperature=self.cfg.temperature, score=False
        )
        return output.log_prob_BGT

    def reference_log_probs(self, packed: Packed) -> Tensor:
        """Log-probabilities (B, G, T) of the CoTs under the frozen stage-1 model."""
        if self.reference is not None:
            return self.log_probs(self.reference, packed)
        with adapters_off(self.model):
            return self.log_probs(self.model, packed)

    # ------------------------------------------------------------------ the update

    def update(self, parts: Sequence[Rollouts]) -> dict[str, float]:
        """Take one optimizer step on this rank's micro-batches of an update."""
        # 1. Count tokens and decided (pair, rollout) over all ranks: the divisors of the loss.
        rank_tokens = sum(part.tokens for part in parts)
        tokens = max(1.0, sum_over_ranks(float(rank_tokens)))
        counted_K = sum(counted(part.label_NK, theta=self.cfg.theta) for part in parts)
        count_K = []
        for count in counted_K * self.cfg.group_size:
            count_K.append(max(1.0, sum_over_ranks(float(count))))

        # 2. One packed forward and one backward per micro-batch.
        self.model.train()
        sums = dict.fromkeys(LOSS_SUMS, 0.0)
        for part in parts:
            result = self.loss(part, tokens, count_K)
            self.backward(result)
            for name, value in result.sums.items():
                sums[name] += value

        # 3. Metrics over all ranks.
        total = {name: sum_over_ranks(value) for name, value in sums.items()}
        metrics = {}
        for name in ("loss", "policy", "kl", "bt"):
            metrics[f"train/{name}"] = total[name]
        metrics["train/accuracy"] = total["correct"] / max(1.0, total["decided"])
        metrics["train/ratio_mean"] = total["ratio"] / tokens
        metrics["train/clip_frac"] = total["clipped"] / tokens
        if self.grad_norms is not None:
            for name, norm in self.grad_norms().items():
                metrics[f"train/grad_norm/{name}"] = norm
        return metrics

    def loss(self, part: Rollouts, tokens: float, count_K: Sequence[float]) -> DualLoss:
        """Compute both objectives of a micro-batch from one packed forward.

        tokens   The divisor of the policy and KL terms.
        count_K  The divisor of the Bradley-Terry term in each dimension.
        """
        cfg = self.cfg
        output = packed_forward(self.model, part.packed, temperature=cfg.temperature)

        # GRPO with a clipped token surrogate: SUM over tokens / tokens of the update.
        # With a single update per step, the old policy is the current one.
        mask = part.packed.token_BGT.flatten(0, 1)
        log_prob = output.log_prob_BGT.flatten(0, 1)
        old = log_prob.detach()
        if part.old_BGT is not None:
            old = part.old_BGT.flatten(0, 1)
        policy = token_surrogate(
            log_prob,
            old,
            part.advantage_N2G.flatten().unsqueeze(-1),
            mask=mask,
            count=tokens,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
        )

        # KL to the frozen stage-1 model.
        kl = torch.zeros((), device=log_prob.device)
        if part.reference_BGT is not None:
            kl_terms = k3_kl(log_prob, part.reference_BGT.flatten(0, 1))
            kl = masked_mean(kl_terms, mask, count=tokens)

        # Bradley-Terry between rollout i of A and rollout i of B: M = (pair, rollout).
        pairs = len(part.label_NK)
        reward_N2GK = output.reward_BGK.reshape(pairs, 2, cfg.group_size, -1)
        reward_M2K = reward_N2GK.transpose(1, 2).flatten(0, 1)
        label_MK = part.label_NK.repeat_interleave(cfg.group_size, 0)
        bt = preference_loss(
            reward_M2K,
            label_MK,
            weight_K=self.model.loss_weight_K,
            theta=cfg.theta,
            count_K=count_K,
        )

        # Count (pair, rollout, dimension) with a label of 1 or -1, and those with its sign.
        margin_MK = (reward_M2K[:, 0] - reward_M2K[:, 1]).detach() * label_MK
        is_decided_MK = margin_MK.isfinite() & (label_MK != 0)

        # The loss, and sums for metrics.
        loss = policy.loss + cfg.kl_weight * kl + cfg.bt_weight * bt
        sums = {
            "loss": loss.item(),
            "policy": policy.loss.item(),
            "kl": kl.item(),
            "bt": bt.item(),
            "correct": (margin_MK > 0).sum().item(),
            "decided": is_decided_MK.sum().item(),
            "ratio": policy.metrics["ratio_mean"] * part.tokens,
            "clipped": policy.metrics["clip_frac"] * part.tokens,
        }
        return DualLoss(loss, sums)

    def backward(self, result: DualLoss) -> None:
        """Run backward; the engine takes the optimizer step on the last one of an update."""
        if not math.isfinite(result.sums["loss"]):
            terms = [f"{name} {result.sums[name]}" for name in ("policy", "kl", "bt")]
            say(f"the loss is {result.sums['loss']}: {', '.join(terms)}")
        # The engine divides by its accumulation and averages over ranks; undo both.
        faults.point("backward")
        self.engine.backward(result.loss * (self.accumulation * world_size()))
        faults.point("update")
        self.engine.step()

    def rollout_metrics(self, parts: Sequence[Rollouts]) -> dict[str, float]:
        """MEANS over all CoTs of the step, over all ranks: rewards, lengths, finished share."""
        # Rule rewards of all CoTs of this rank.
        rules = []
        for part in parts:
            for pair in part.rules:
                for group in pair:
                    rules += group
        sums = {}
        for name in REWARD_PARTS:
            sums[f"reward/{name}"] = sum(getattr(rule, name) for rule in rules)

        # Lengths, and groups whose rewards are all equal: they teach nothing.
        tokens = 0
        finished = 0
        zero_spread = 0
        for part in parts:
            tokens += part.tokens
            finished += int(part.finished_N2G.sum())
            zero_spread += int((part.advantage_N2G == 0).all(-1).sum())
        sums["cot/tokens"] = float(tokens)
        sums["cot/finished"] = float(finished)
        sums["reward/zero_spread"] = self.cfg.group_size * float(zero_spread)

        # MEANS over all ranks.
        count = self.cfg.pairs_per_step * 2 * self.cfg.group_size
        return {name: sum_over_ranks(value) / count for name, value in sums.items()}

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair], how: Generation) -> dict[str, float]:
        """Evaluate held-out pairs with one CoT per video.

        Metrics: preference accuracy, share of correct sub-dimension scores, share of finished
        CoTs. The ranks share the pairs. The reward is read off the KV cache that the CoT was
        generated with.
        """
        self.model.eval()
        results: list[HeldoutPair] = []
        for rows in rank_batches(
            len(pairs), self.cfg.micro_batch * self.cfg.group_size
        ):
            # A sharded model needs equally many forwards on every rank: pad an empty batch.
            batch_pairs = [pairs[i] for i in rows or [0]]
            videos, encoded = encode_pairs(self.model, batch_pairs)
            batch = self.model.batch(encoded, videos, query=False)
            written = generate(self.model, batch, how)
            reward_BK = rewards_from_cache(self.model, written)
            for n, row in enumerate(rows):
                cots = [written.cot(2 * n), written.cot(2 * n + 1)]
                margin_K = reward_BK[2 * n] - reward_BK[2 * n + 1]
                result = HeldoutPair(
                    row=row,
                    margin_K=margin_K.tolist(),
                    quality=self.heldout_quality(pairs[row], cots),
                    finished=sum(cot.finished for cot in cots) / 2,
                )
                results.append(result)

        # Put the results of all ranks into the order of the pairs.
        gathered: list[HeldoutPair] = []
        for rank_results in gather_objects(results):
            gathered += rank_results
        gathered.sort(key=lambda result: result.row)

        # MEANS over the pairs.
        margin_NK = torch.tensor([result.margin_K for result in gathered])
        metrics = heldout_metrics(self.model, margin_NK, pairs, with_ties=False)
        quality = sum(result.quality for result in gathered)
        finished = sum(result.finished for result in gathered)
        metrics["heldout/quality"] = quality / len(gathered)
        metrics["heldout/finished"] = finished / len(gathered)
        return metrics

    def heldout_quality(self, pair: Pair, cots: Sequence[PackedCot]) -> float:
        """MEAN share of correct sub-dimension scores of both CoTs; 0 for unknown scores."""
        total = 0
        for cot, truth in zip(cots, (pair.scores_A, pair.scores_B), strict=True):
            total += reward_cot(self.model, cot, truth or {}, self.rules).quality
        return total / 2
