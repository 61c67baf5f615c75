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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common import faults, progress
from common.distributed import (
    derive_seed,
    mean_over_ranks,
    rank_batches,
    sum_over_ranks,
)
from common.log import say
from common.lora import adapters_off
from common.policy_gradient import group_advantages, k3_kl, masked_mean, token_surrogate
from common.updates import (
    all_ranks,
    backward_and_step,
    rank_micro_batches,
)
from rm.block_attention import use_attention
from rm.config import Generation
from rm.cot_backend import BuiltinBackend
from rm.cot_rollout import (
    Rollouts,
    SampledPairs,
    encode_pairs,
    pack_pairs,
    reward_cot,
    reward_cots,
)
from rm.data import label_rows
from rm.generate import generate, rewards_from_cache
from rm.losses import counted, preference_loss
from rm.metrics import gather_in_order, heldout_metrics
from rm.packed import Packed, packed_forward

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine
    from rm.config import DualRlConfig
    from rm.cot_backend import CotBackend
    from rm.data import Pair, PairSchedule
    from rm.model import DeScore
    from rm.text_rewards import RuleRewardConfig

# Added to the standard deviation of a group.
EPS = 1e-6
REWARD_PARTS = ("total", "quality", "format", "length", "preference")


@dataclass
class DualRl:
    """The training loop of stage 2; its only state is the weights and the engine.

    engine      The engine; it accumulates the gradients of an optimizer step.
    reference   The frozen stage-1 model. None: ``model`` with its adapters switched off.
    backend     Samples the CoTs. None: ``model`` itself, a micro-batch at a time.
    grad_norms  Returns gradient norms before clipping by part of the model; called after
                each optimizer step.
    """

    cfg: DualRlConfig
    rules: RuleRewardConfig
    model: DeScore
    engine: Engine
    pairs: Sequence[Pair]
    schedule: PairSchedule
    seed: int
    reference: DeScore | None = None
    backend: CotBackend | None = None
    grad_norms: Callable[[], Mapping[str, float]] = dict

    def __post_init__(self) -> None:
        # Every reward of this stage follows a CoT.
        self.model.cot_in_training = "always"
        use_attention(self.model, self.cfg.attention)
        if self.reference is not None:
            use_attention(self.reference, self.cfg.attention)
        # Of the weights: the number of updates that this process has made.
        self.version = 0
        if self.backend is None:
            # By default, both videos of each pair of a micro-batch go through the model together.
            batch = self.cfg.cot_batch or 2 * self.cfg.micro_batch
            self.backend = BuiltinBackend(self.model, batch=batch)

    def step(self, step: int) -> dict[str, float]:
        """Sample and reward ``pairs_per_step`` pairs, then make all updates on them."""
        start = time.perf_counter()
        updates = self.micro_batches(step)

        # 1. Sample G CoTs for both videos of every pair, with the current policy.
        faults.point("chains")
        rows = []
        for update in updates:
            for micro_batch in update:
                rows += micro_batch
        self.backend.sync(self.version)
        sampled = self.sample(rows, step).parts(self.cfg.micro_batch)
        self.backend.rest()

        # 2. Reward the CoTs and normalise the rewards within each group.
        faults.point("reward")
        rollouts = []
        for update in updates:
            rollouts.append([self.rollouts(next(sampled)) for _ in update])
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
        size = self.cfg.pairs_per_update
        updates = []
        for first in range(0, len(rows), size):
            update = rows[first : first + size]
            updates.append(rank_micro_batches(update, self.cfg.micro_batch))
        return updates

    # ------------------------------------------------------------------ sampling and rewards

    @torch.no_grad()
    def sample(self, rows: Sequence[int], step: int) -> SampledPairs:
        """Sample G CoTs for both videos of some pairs; the backend decides on batches.

        Only the tokens are used: log-probabilities come from `packed_forward`, the old
        policy's too, so that a ratio compares policies and not two ways of computing.
        """
        progress.enter("CoTs")
        self.model.eval()
        cfg = self.cfg
        pairs = [self.pairs[row] for row in rows]
        videos, encoded = encode_pairs(self.model, pairs)

        # A seed depends on the row of the table, not on batches or ranks.
        seeds = [
            derive_seed(self.seed, "rollout", step, row, side, i)
            for row in rows
            for side in range(2)
            for i in range(cfg.group_size)
        ]

        # A group of CoTs for every video.
        how = Generation(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            repetition_penalty=1.0,
        )
        cots = self.backend.write(
            encoded,
            videos,
            how,
            version=self.version,
            seeds=seeds,
            copies=cfg.group_size,
        )
        return SampledPairs(pairs, videos, encoded, cots)

    @torch.no_grad()
    def rollouts(self, sampled: SampledPairs) -> Rollouts:
        """Reward the CoTs of a micro-batch, and compute the log-probabilities GRPO needs."""
        self.model.eval()
        progress.enter("score")
        progress.tick()
        cfg = self.cfg
        device = self.model.device

        # Rule rewards, and advantages relative to the G CoTs of the same video.
        rules = reward_cots(self.model, sampled, self.rules)
        totals = [[rule.total for rule in group] for group in rules]
        advantage_VG = group_advantages(
            torch.tensor(totals),
            scale="group",
            eps=EPS,
            correction=1 if cfg.advantage_std == "sample" else 0,
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
        finished = [[cot.finished for cot in group] for group in sampled.cots]
        labels = label_rows(sampled.pairs, self.model.dimensions)
        return Rollouts(
            packed=packed,
            label_NK=torch.tensor(labels, device=device),
            advantage_VG=advantage_VG.to(device),
            rules=rules,
            finished_VG=torch.tensor(finished),
            old_BGT=old_BGT,
            reference_BGT=reference_BGT,
        )

    def log_probs(self, model: DeScore, packed: Packed) -> Tensor:
        """Log-probabilities (B, G, T) of the CoTs under a model."""
        output = packed_forward(model, packed, temperature=self.cfg.temperature)
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
        progress.enter("update")
        # 1. Count tokens and decided (pair, rollout) over all ranks: the divisors of the loss.
        cfg = self.cfg
        tokens = max(1.0, sum_over_ranks(sum(part.tokens for part in parts)))
        counted_K = sum(counted(part.label_NK, theta=cfg.theta) for part in parts)
        count_K = []
        for count in counted_K * cfg.group_size:
            count_K.append(max(1.0, sum_over_ranks(count)))

        # 2. One packed forward and one backward per micro-batch.
        self.model.train()
        rank_sums: dict[str, float] = defaultdict(float)
        for part in parts:
            loss, terms = self.loss(part, tokens, count_K)
            if not math.isfinite(terms["loss"]):
                parts_of_loss = [f"{name} {value}" for name, value in terms.items()]
                say(f"the loss is not finite: {', '.join(parts_of_loss)}")
            # The loss is a part of the update's SUM: undo the engine's average.
            backwards = cfg.pairs_per_update // cfg.micro_batch
            backward_and_step(self.engine, loss * backwards)
            for name, value in terms.items():
                rank_sums[name] += value
        # The weights have moved: a backend's copy of them is stale.
        self.version += 1

        # 3. Metrics over all ranks.
        sums = all_ranks(rank_sums)
        metrics = {}
        for name in ("loss", "policy", "kl", "bt"):
            metrics[f"train/{name}"] = sums[name]
        metrics["train/accuracy"] = sums["correct"] / max(1.0, sums["decided"])
        metrics["train/ratio_mean"] = sums["ratio"] / tokens
        metrics["train/clip_frac"] = sums["clipped"] / tokens
        for name, norm in self.grad_norms().items():
            metrics[f"train/grad_norm/{name}"] = norm
        return metrics

    def loss(
        self, part: Rollouts, tokens: float, count_K: Sequence[float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute both objectives of a micro-batch from one packed forward.

        Returns the loss, and its SUMS for metrics by name.

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
            part.advantage_VG.flatten().unsqueeze(-1),
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
        shape = (len(part.label_NK), 2, cfg.group_size, -1)
        reward_N2GK = output.reward_BGK.reshape(shape)
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
        return loss, sums

    def rollout_metrics(self, parts: Sequence[Rollouts]) -> dict[str, float]:
        """MEANS over all CoTs of the step, over all ranks: rewards, lengths, finished share."""
        # Rule rewards of all CoTs of this rank.
        rules = [rule for part in parts for group in part.rules for rule in group]
        sums = {}
        for name in REWARD_PARTS:
            sums[f"reward/{name}"] = sum(getattr(rule, name) for rule in rules)

        # Lengths, and groups whose rewards are all equal: they teach nothing.
        sums["cot/tokens"] = sum(part.tokens for part in parts)
        sums["cot/finished"] = sum(int(part.finished_VG.sum()) for part in parts)
        equal = [(part.advantage_VG == 0).all(-1).sum() for part in parts]
        sums["reward/zero_spread"] = self.cfg.group_size * int(sum(equal))

        # MEANS over all ranks.
        count = self.cfg.pairs_per_step * 2 * self.cfg.group_size
        return {name: value / count for name, value in all_ranks(sums).items()}

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Evaluate held-out pairs with one CoT per video, as the model generates them.

        Metrics: preference accuracy, share of correct sub-dimension scores, share of finished
        CoTs, number of pairs with an unfinished CoT. As in `DeScoreScorer`, an unfinished CoT
        gives no reward: the margin is NaN, which no label agrees with. The ranks share the
        pairs. The reward is read off the KV cache that the CoT was generated with.
        """
        self.model.eval()
        results: list[tuple[int, list[float], float, float]] = []
        for rows in rank_batches(
            len(pairs), self.cfg.micro_batch * self.cfg.group_size
        ):
            # A sharded model needs equally many forwards on every rank: pad an empty batch.
            batch_pairs = [pairs[i] for i in rows or [0]]
            videos, encoded = encode_pairs(self.model, batch_pairs)
            batch = self.model.batch(encoded, videos, query=False)
            written = generate(self.model, batch, self.model.generation)
            reward_BK = rewards_from_cache(self.model, written).cpu()
            reward_BK[~written.finished_B] = math.nan
            for n, row in enumerate(rows):
                cots = (written.cot(2 * n), written.cot(2 * n + 1))
                margin_K = reward_BK[2 * n] - reward_BK[2 * n + 1]
                quality = 0.0
                truths = (pairs[row].scores_A, pairs[row].scores_B)
                for cot, truth in zip(cots, truths, strict=True):
                    rule = reward_cot(self.model, cot, truth, self.rules)
                    quality += rule.quality / 2
                finished = sum(cot.finished for cot in cots) / 2
                results.append((row, margin_K.tolist(), quality, finished))

        # MEANS over the pairs of all ranks, in the order of the pairs.
        columns = zip(*gather_in_order(results), strict=True)
        _, margin_NK, quality_N, finished_N = columns
        metrics = heldout_metrics(
            self.model, torch.tensor(margin_NK), pairs, with_ties=False
        )
        metrics["heldout/quality"] = sum(quality_N) / len(pairs)
        metrics["heldout/finished"] = sum(finished_N) / len(pairs)
        metrics["heldout/unfinished"] = sum(share < 1 for share in finished_N)
        return metrics
