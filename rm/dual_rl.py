"""DeScore, stage 2: dual-objective RL (2605.05922, Eq. 7 and 10; spec section 3).

G chains of thought are sampled for each video of a preference pair and judged by rules. Then one forward of
``[prompt, video][CoT_1 <Reward>] ... [CoT_G <Reward>]`` per video gives both objectives:

    L = SUM_tokens [ -min(r A, clip(r) A) + kl_weight k3 ] / tokens
      + bt_weight SUM_decided [ -log sig(r_win - r_lose) ] / decided

with tokens and decided (pair, rollout) counted over the WHOLE update, all ranks and micro-batches. Bradley-Terry
compares rollout i of A with rollout i of B. Every array is indexed (pair, side, rollout): N, 2, G.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from common.lora import adapters_off
from common.policy_gradient import group_advantages, k3_kl, masked_mean, token_surrogate
from rm.config import Generation
from rm.cot_backend import HfBackend
from rm.data import label_of_total, label_rows
from rm.generate import generate, rewards_from_cache
from rm.losses import counted, preference_loss
from rm.metrics import accuracy_by_dimension, preference_accuracy
from rm.packed import Packed, PackedCot, pack, packed_forward
from rm.text_rewards import (
    RuleReward,
    RuleRewardConfig,
    preference_rewards,
    rule_reward,
)
from rm.video import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Engine
    from rm.config import DualRlConfig
    from rm.cot_backend import CotBackend
    from rm.data import Pair, PairSchedule
    from rm.model import DeScore
    from rm.prompt import Encoded
    from rm.video import PreparedVideo

EPS = 1e-6  # beside the spread of a group


def backwards_per_update(cfg: DualRlConfig, ranks: int) -> int:
    """The engine's gradient accumulation. ValueError when ranks and micro-batches do not divide an update evenly."""
    if cfg.pairs_per_update % (ranks * cfg.micro_batch):
        raise ValueError(
            f"dual_rl.pairs_per_update={cfg.pairs_per_update} must be a multiple of ranks x micro_batch = "
            f"{ranks} x {cfg.micro_batch}"
        )
    return cfg.pairs_per_update // (ranks * cfg.micro_batch)


@dataclass(frozen=True)
class Sampled:
    """A pair and what was written about it: ``videos`` and ``encoded`` by side, ``chains`` by side and rollout."""

    row: int
    videos: Sequence[PreparedVideo]
    encoded: Sequence[Encoded]
    chains: Sequence[Sequence[PackedCot]]


@dataclass(frozen=True)
class Rollouts:
    """One micro-batch of N pairs, sampled and judged; chains of ``packed`` are in the order (pair, side, rollout).

    label_NK; advantage_N2G; rules[pair][side][rollout]; finished_N2G bool
    old_BGT, reference_BGT  log-probs when sampled, of the trained model whoever chose the tokens (`rm.cot_backend`),
                            and of the frozen stage-1 model; None: not needed
    """

    packed: Packed
    label_NK: Tensor
    advantage_N2G: Tensor
    rules: Sequence[Sequence[Sequence[RuleReward]]]
    finished_N2G: Tensor
    old_BGT: Tensor | None = None
    reference_BGT: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (
            len(self.label_NK),
            2,
            self.packed.query_BG.numel() // (2 * len(self.label_NK)),
        )
        if self.advantage_N2G.shape != shape or self.finished_N2G.shape != shape:
            got = tuple(self.advantage_N2G.shape), tuple(self.finished_N2G.shape)
            raise ValueError(
                f"Rollouts: advantages and finished {got}, (pair, side, rollout) is {shape}"
            )

    @property
    def tokens(self) -> int:
        return int(self.packed.token_BGT.sum())


class DualRl:
    """The state of a run is the model's weights and the engine's; a step is a function of its number.

    engine      must accumulate `backwards_per_update` gradients before it takes a step
    reference   the frozen stage-1 model; None: ``model`` with its adapters switched off
    writer      of the chains; None: ``model`` itself, a micro-batch at a time
    grad_norms  asked after each optimizer step, if given: norms before clipping, by part of the model
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
        writer: CotBackend | None = None,
        grad_norms: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.cfg, self.rules, self.model, self.engine, self.pairs = (
            cfg,
            rules,
            model,
            engine,
            pairs,
        )
        self.schedule, self.seed, self.reference, self.grad_norms = (
            schedule,
            seed,
            reference,
            grad_norms,
        )
        self.accumulation = backwards_per_update(cfg, world_size())
        self.writer = (
            HfBackend(model, batch=2 * cfg.micro_batch) if writer is None else writer
        )
        self.version = 0  # of the weights: updates made by this process

    def step(self, step: int) -> dict[str, float]:
        """Sample and judge ``pairs_per_step`` pairs, then make all updates on them. Step numbers start at 0."""
        start = time.perf_counter()
        updates = self.own_updates(step)
        self.writer.sync(self.version)
        pairs = iter(
            self.sample(
                [row for parts in updates for rows in parts for row in rows], step
            )
        )
        self.writer.rest()
        faults.point("reward")
        rollouts = [
            [self.rollouts([next(pairs) for _ in rows]) for rows in parts]
            for parts in updates
        ]
        sampled = time.perf_counter()
        metrics: list[dict[str, float]] = [self.update(parts) for parts in rollouts]
        done = time.perf_counter()
        seconds = {
            "seconds/rollout": sampled - start,
            "seconds/update": done - sampled,
            "seconds/step": done - start,
        }
        mean = {
            name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]
        }
        return {
            **self.describe([part for parts in rollouts for part in parts]),
            **mean,
            **mean_over_ranks(seconds),
        }

    def own_updates(self, step: int) -> list[list[list[int]]]:
        """[update][micro-batch] -> rows of the table that are this rank's. An update's pairs do not depend on ranks."""
        rows = [draw.row for draw in self.schedule.at(step)]
        size, share, micro = (
            self.cfg.pairs_per_update,
            self.cfg.pairs_per_update // world_size(),
            self.cfg.micro_batch,
        )
        updates = []
        for first in range(0, len(rows), size):
            own = rows[first + rank() * share : first + (rank() + 1) * share]
            updates.append([own[i : i + micro] for i in range(0, share, micro)])
        return updates

    def collect(self, rows: Sequence[int], step: int) -> Rollouts:
        """Write about some pairs and judge it, without any other pair."""
        return self.rollouts(self.sample(rows, step))

    @torch.no_grad()
    def sample(self, rows: Sequence[int], step: int) -> list[Sampled]:
        """Write G chains about both videos of every pair: all at once, how many go together is the writer's affair."""
        self.model.eval()
        cfg = self.cfg
        videos, encoded = self.inputs([self.pairs[row] for row in rows])
        how = Generation(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            repetition_penalty=1.0,
        )
        seeds = [
            derive_seed(self.seed, "rollout", step, row, side, i)
            for row in rows
            for side in range(2)
            for i in range(cfg.group_size)
        ]
        faults.point("chains")
        chains = self.writer.write(
            encoded,
            videos,
            how,
            version=self.version,
            seeds=seeds,
            copies=cfg.group_size,
        )
        both = [slice(2 * n, 2 * n + 2) for n in range(len(rows))]
        return [
            Sampled(row, videos[of], encoded[of], chains[of])
            for row, of in zip(rows, both, strict=True)
        ]

    @torch.no_grad()
    def rollouts(self, sampled: Sequence[Sampled]) -> Rollouts:
        """Reward the chains of a micro-batch, and note how likely they were."""
        self.model.eval()
        cfg = self.cfg
        rows = [pair.row for pair in sampled]
        videos, encoded = (
            [x for pair in sampled for x in getattr(pair, name)]
            for name in ("videos", "encoded")
        )
        chains = [group for pair in sampled for group in pair.chains]
        rules = [
            [
                self.rewards(group, self.truth(pair.row, side))
                for side, group in enumerate(pair.chains)
            ]
            for pair in sampled
        ]
        if self.rules.preference > 0:
            rules = [
                self.with_preference(*both, self.pairs[row].label)
                for both, row in zip(rules, rows, strict=True)
            ]
        reward_N2G = torch.tensor(
            [[[r.total for r in group] for group in pair] for pair in rules]
        )
        advantage_VG = group_advantages(
            reward_N2G.flatten(0, 1), scale="group", eps=EPS
        )
        finished = [
            [[chain.finished for chain in group] for group in pair.chains]
            for pair in sampled
        ]
        packed = self.packed(encoded, videos, chains).to(self.model.device)
        names = self.model.dimensions
        several = (
            cfg.pairs_per_step > cfg.pairs_per_update
        )  # then the weights move away from those that sampled
        return Rollouts(
            packed=packed,
            label_NK=torch.tensor(
                label_rows([self.pairs[row] for row in rows], names),
                device=self.model.device,
            ),
            advantage_N2G=advantage_VG.view_as(reward_N2G).to(self.model.device),
            rules=rules,
            finished_N2G=torch.tensor(finished),
            old_BGT=self.log_probs(self.model, packed) if several else None,
            reference_BGT=self.reference_log_probs(packed)
            if cfg.kl_weight > 0
            else None,
        )

    def packed(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        chains: Sequence[Sequence[PackedCot]],
    ) -> Packed:
        """Rows in the order (pair, side), or (pair, side, part of the group)."""
        size = self.cfg.cots_per_row or self.cfg.group_size
        starts = range(0, self.cfg.group_size, size)
        return pack(
            self.model,
            [item for item in encoded for _ in starts],
            [video for video in videos for _ in starts],
            [group[i : i + size] for group in chains for i in starts],
        )

    def update(self, parts: Sequence[Rollouts]) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches of an update."""
        cfg = self.cfg
        tokens = sum_over_ranks(float(sum(part.tokens for part in parts)))
        found_K = (
            sum(counted(part.label_NK, theta=cfg.theta) for part in parts)
            * cfg.group_size
        )
        count_K = [max(1.0, sum_over_ranks(float(found))) for found in found_K]
        self.model.train()
        sums = dict.fromkeys(
            ("loss", "policy", "kl", "bt", "right", "decided", "ratio", "clipped"), 0.0
        )
        for part in parts:
            judged = packed_forward(
                self.model, part.packed, temperature=cfg.temperature
            )
            mask = part.packed.token_BGT.flatten(0, 1)
            log_prob = judged.log_prob_BGT.flatten(0, 1)
            old = (
                log_prob.detach()
                if part.old_BGT is None
                else part.old_BGT.flatten(0, 1)
            )
            policy = token_surrogate(
                log_prob, old, part.advantage_N2G.flatten().unsqueeze(-1), mask=mask, count=max(1.0, tokens),
                clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
            )  # fmt: skip
            kl = torch.zeros((), device=log_prob.device)
            if part.reference_BGT is not None:
                kl = masked_mean(
                    k3_kl(log_prob, part.reference_BGT.flatten(0, 1)),
                    mask,
                    count=max(1.0, tokens),
                )
            # (pair, side, rollout) -> rollout i of A against rollout i of B
            reward_N2GK = judged.reward_BGK.reshape(
                len(part.label_NK), 2, cfg.group_size, -1
            )
            reward_M2K = reward_N2GK.transpose(1, 2).flatten(0, 1)
            label_MK = part.label_NK.repeat_interleave(cfg.group_size, 0)
            bt = preference_loss(
                reward_M2K,
                label_MK,
                weight_K=self.model.loss_weight_K,
                theta=cfg.theta,
                count_K=count_K,
            )
            loss = policy.loss + cfg.kl_weight * kl + cfg.bt_weight * bt
            if not math.isfinite(loss.item()):
                terms = f"policy {policy.loss.item()}, kl {kl.item()}, bt {bt.item()}"
                say(f"the loss is {loss.item()}: {terms}")
            # SUM / global count; the engine divides by accumulation and averages over ranks
            faults.point("backward")
            self.engine.backward(loss * (self.accumulation * world_size()))
            faults.point("update")
            self.engine.step()
            margin_MK = (reward_M2K[:, 0] - reward_M2K[:, 1]).detach() * label_MK
            # over dimensions too, each (pair, rollout) with a label there
            found = (
                loss,
                policy.loss,
                kl,
                bt,
                (margin_MK > 0).sum(),
                (margin_MK.isfinite() & (label_MK != 0)).sum(),
            )
            for name, value in zip(
                ("loss", "policy", "kl", "bt", "right", "decided"), found, strict=True
            ):
                sums[name] += value.item()
            sums["ratio"] += policy.metrics["ratio_mean"] * part.tokens
            sums["clipped"] += policy.metrics["clip_frac"] * part.tokens
        self.version += 1
        total = {name: sum_over_ranks(value) for name, value in sums.items()}
        norms = self.grad_norms() if self.grad_norms is not None else {}
        return {
            **{f"train/{name}": total[name] for name in ("loss", "policy", "kl", "bt")},
            "train/accuracy": total["right"] / max(1.0, total["decided"]),
            "train/ratio_mean": total["ratio"] / max(1.0, tokens),
            "train/clip_frac": total["clipped"] / max(1.0, tokens),
            **{f"train/grad_norm/{name}": value for name, value in norms.items()},
        }

    def describe(self, parts: Sequence[Rollouts]) -> dict[str, float]:
        """MEANS over all chains of the step: rule rewards and their parts, length, share that ended by themselves."""
        flat = [
            rule
            for part in parts
            for pair in part.rules
            for group in pair
            for rule in group
        ]
        names = ("total", "quality", "format", "length", "preference")
        own = {
            f"reward/{name}": sum(getattr(rule, name) for rule in flat)
            for name in names
        }
        own["cot/tokens"] = float(sum(part.tokens for part in parts))
        own["cot/finished"] = float(sum(int(part.finished_N2G.sum()) for part in parts))
        own["reward/zero_spread"] = self.cfg.group_size * float(
            sum(int((part.advantage_N2G == 0).all(-1).sum()) for part in parts)
        )
        count = self.cfg.pairs_per_step * 2 * self.cfg.group_size
        return {name: sum_over_ranks(value) / count for name, value in own.items()}

    def reference_log_probs(self, packed: Packed) -> Tensor:
        """(B, G, T) of the frozen stage-1 model."""
        model = self.model if self.reference is None else self.reference
        with adapters_off(model) if self.reference is None else nullcontext():
            return self.log_probs(model, packed)

    def log_probs(self, model: DeScore, packed: Packed) -> Tensor:
        return packed_forward(
            model, packed, temperature=self.cfg.temperature, score=False
        ).log_prob_BGT

    def inputs(
        self, pairs: Sequence[Pair]
    ) -> tuple[list[PreparedVideo], list[Encoded]]:
        """Both videos of every pair, in the order (pair, side)."""
        videos = [
            prepare(path, self.model.settings)
            for pair in pairs
            for path in (pair.video_A, pair.video_B)
        ]
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        return videos, [
            self.model.encode(prompt, video)
            for prompt, video in zip(prompts, videos, strict=True)
        ]

    def truth(self, row: int, side: int) -> Mapping[str, int | None]:
        pair = self.pairs[row]
        scores = (pair.scores_A, pair.scores_B)[side]
        if scores is None:
            raise ValueError(
                f"the pair {pair.video_A} has no right scores: read it with require_scores=True"
            )
        return scores

    def rewards(
        self, chains: Sequence[PackedCot], truth: Mapping[str, int | None]
    ) -> list[RuleReward]:
        decode = self.model.tokenizer.decode
        return [
            rule_reward(decode(list(c.ids)), truth, tokens=len(c.ids), how=self.rules)
            for c in chains
        ]

    def with_preference(
        self, of_A: list[RuleReward], of_B: list[RuleReward], label: int
    ) -> list[list[RuleReward]]:
        """The generative baseline's term added to both groups of a pair."""
        overall = [[rule.overall for rule in group] for group in (of_A, of_B)]
        found = preference_rewards(*overall, label)
        weight = self.rules.preference
        return [
            [
                replace(r, preference=x, total=r.total + weight * x)
                for r, x in zip(group, terms, strict=True)
            ]
            for group, terms in zip((of_A, of_B), found, strict=True)
        ]

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair], how: Generation) -> dict[str, float]:
        """On pairs not trained on, with one chain of the judge's own, greedy: preference accuracy, share of right
        sub-dimension scores, share of finished chains. Ranks share the pairs. The reward is read off the KV cache that
        wrote the chain, so no other writer is asked.
        """
        self.model.eval()
        found: list[tuple[int, list[float], float, float]] = []
        for rows in own_batches(len(pairs), self.cfg.micro_batch * self.cfg.group_size):
            videos, encoded = self.inputs([pairs[i] for i in rows or [0]])
            written = generate(
                self.model, self.model.batch(encoded, videos, query=False), how
            )
            reward_BK = rewards_from_cache(self.model, written)
            for n, pair in enumerate(pairs[i] for i in rows):
                chains = [
                    PackedCot(tuple(written.ids(i)), bool(written.finished_B[i]))
                    for i in (2 * n, 2 * n + 1)
                ]
                judged = zip(
                    chains, (pair.scores_A or {}, pair.scores_B or {}), strict=True
                )
                quality = (
                    sum(
                        self.rewards([chain], truth)[0].quality
                        for chain, truth in judged
                    )
                    / 2
                )
                margin_K = (reward_BK[2 * n] - reward_BK[2 * n + 1]).tolist()
                found.append(
                    (
                        rows[n],
                        margin_K,
                        quality,
                        sum(chain.finished for chain in chains) / 2,
                    )
                )
        measured = sorted(
            row for rank_rows in gather_objects(found) for row in rank_rows
        )
        margin_NK, names = (
            torch.tensor([row[1] for row in measured]),
            list(self.model.dimensions),
        )
        label_N = torch.tensor([label_of_total(pair, names) for pair in pairs])
        accuracy = preference_accuracy(self.model.total(margin_NK), label_N)
        return {
            "heldout/accuracy": accuracy.without_ties,
            **accuracy_by_dimension(
                margin_NK, torch.tensor(label_rows(pairs, names)), names
            ),
            "heldout/quality": sum(row[2] for row in measured) / len(measured),
            "heldout/finished": sum(row[3] for row in measured) / len(measured),
        }
