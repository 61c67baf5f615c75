"""Training on pairs of latents: Flow-DPO (2501.13918), Flow-RWR and plain fine-tuning, one step from disk to metrics.

The loop knows the Protocols of `common.types` and the files of `alignment.pair_store` only. sigma and noise of a pair
come from (seed, step, its place in the step): neither ranks nor micro-batches change them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from alignment.dpo_losses import beta_at, flow_dpo_terms, rwr_weights
from common import faults
from common.distributed import (
    gather_rows,
    own_batches,
    rank,
    seeded_generator,
    world_size,
)
from common.log import say
from common.schedule import IndexSchedule

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.config import DpoConfig
    from alignment.pair_store import PairBatch, PairSet
    from common.types import Engine, Generator

BINS = 5  # of noise levels in the metrics


class NoiseDraw(NamedTuple):
    """What a pair's winner and loser share: noise levels (N,) and noises (N, C, F, H, W)."""

    sigma_N: Tensor
    noise_NCFHW: Tensor


class Errors(NamedTuple):
    """Flow errors of winners and losers, (N,); NaN of losers where nobody asked for them."""

    chosen_N: Tensor
    rejected_N: Tensor


class PairTerms(NamedTuple):
    """Per pair, (N,): what its loss is, and how its errors compare with the reference's (NaN without one)."""

    loss_N: Tensor
    chosen_change_N: Tensor
    rejected_change_N: Tensor


def steps_of(cfg: DpoConfig, pairs: int) -> int:
    """Optimizer steps of a run: epochs x pairs / pairs_per_step, rounded down, but one."""
    return max(1, int(cfg.epochs * pairs / cfg.pairs_per_step))


def draw_sigma(cfg: DpoConfig, source: torch.Generator) -> float:
    """One noise level by ``noise``, then ``noise_shift``. In (0, 1)."""
    if cfg.noise == "uniform":
        u = float(torch.rand((), generator=source, dtype=torch.float64))
        u = min(max(u, 1e-6), 1 - 1e-6)
    else:
        u = float(torch.randn((), generator=source, dtype=torch.float64).sigmoid())
    return cfg.noise_shift * u / (1 + (cfg.noise_shift - 1) * u)


class DpoLoop:
    """The state of a run is the generator's weights and the engine's; a step is a function of its number.

    pairs      what is trained on; an online run sets another one on the way
    engine     must accumulate `backwards` gradients before it takes a step
    grad_norm  asked after each optimizer step, if given: the norm before clipping, or None

    Raises ValueError when ranks and micro-batches do not divide ``pairs_per_step``, or "rwr" gets pairs without values.
    """

    def __init__(
        self,
        cfg: DpoConfig,
        *,
        generator: Generator,
        engine: Engine,
        pairs: PairSet,
        seed: int,
        grad_norm: Callable[[], float | Tensor | None] | None = None,
    ) -> None:
        self.cfg, self.generator, self.engine, self.seed, self.grad_norm = (
            cfg,
            generator,
            engine,
            seed,
            grad_norm,
        )
        self.backwards = backwards_per_update(cfg, world_size())
        self.watched: deque[float] = deque(maxlen=cfg.displacement_window)
        self.use(pairs)

    def use(self, pairs: PairSet) -> None:
        """Train on these pairs from now on."""
        self.pairs = pairs
        self.schedule = IndexSchedule(
            len(pairs), seed=self.seed, per_step=self.cfg.pairs_per_step, name="pairs"
        )
        if self.cfg.method == "rwr":
            self.weight_N2 = rwr_weights(
                pairs.values().flatten(), temperature=self.cfg.temperature
            ).view(-1, 2)

    def step(self, step: int) -> dict[str, float]:
        """Optimizer step number ``step`` (from 0) on ``pairs_per_step`` pairs over all ranks; metrics over all of them.

        A loss that is no number is told; what becomes of its gradient is the engine's affair.
        """
        indices, size = self.schedule.at(step), self.cfg.micro_batch
        share = len(indices) // world_size()
        rows = []
        for start in range(rank() * share, (rank() + 1) * share, size):
            places = range(start, start + size)
            batch = self.pairs.read([indices[i] for i in places])
            draw = self.draw(batch, "step", step, places)
            faults.point("forward")
            terms = self.terms(batch, draw, [indices[i] for i in places])
            loss = terms.loss_N.mean()
            if not math.isfinite(float(loss.detach())):
                say(
                    f"step {step}: the loss is {float(loss.detach())} for pairs {[indices[i] for i in places]}"
                )
            faults.point("backward")
            self.engine.backward(loss)
            faults.point("update")
            self.engine.step()
            rows.append(
                torch.stack(
                    [draw.sigma_N, *(one.detach().float().cpu() for one in terms)],
                    dim=1,
                )
            )
        metrics = summarise(gather_rows(torch.cat(rows)), self.cfg, "train")
        norm = self.grad_norm() if self.grad_norm is not None else None
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        self.watched.append(metrics.get("train/chosen_change", math.nan))
        return metrics

    @torch.no_grad()
    def evaluate(self, pairs: PairSet, *, limit: int) -> dict[str, float]:
        """The same of the first held-out pairs, always at the same noise: ``heldout/...``. MEAN over pairs."""
        rows = []
        for own in own_batches(min(limit, len(pairs)), self.cfg.micro_batch):
            batch = pairs.read(own or [0])  # a sharded module is called by all ranks
            draw = self.draw(batch, "heldout", 0, own or [0])
            terms = self.terms(batch, draw, None)
            found = torch.stack(
                [draw.sigma_N, *(one.float().cpu() for one in terms)], dim=1
            )
            found = torch.cat(
                [
                    found,
                    found.new_full((self.cfg.micro_batch - len(found), 4), math.nan),
                ]
            )
            rows.append(found if own else torch.full_like(found, math.nan))
        everything = gather_rows(torch.cat(rows))
        return summarise(everything[~everything[:, 0].isnan()], self.cfg, "heldout")

    def rising(self) -> bool:
        """Did the winner's error rise above the reference's, MEAN over the last ``watch`` steps?"""
        full = len(self.watched) == self.cfg.displacement_window and not any(
            map(math.isnan, self.watched)
        )
        return full and math.fsum(self.watched) > 0

    def draw(
        self, batch: PairBatch, name: str, step: int, places: Sequence[int]
    ) -> NoiseDraw:
        """sigma and eps of each place: winner and loser get the same (Flow-DPO, equation 6)."""
        sources = [
            seeded_generator(self.seed, "dpo", name, step, place) for place in places
        ]
        sigma_N = torch.tensor(
            [draw_sigma(self.cfg, source) for source in sources], dtype=torch.float32
        )
        shape = batch.chosen_NCFHW.shape[1:]
        return NoiseDraw(
            sigma_N,
            torch.stack([torch.randn(shape, generator=source) for source in sources]),
        )

    def terms(
        self, batch: PairBatch, draw: NoiseDraw, indices: Sequence[int] | None
    ) -> PairTerms:
        """Each pair's loss by the config's method; grad as the caller has it. ``indices`` None measures as "dpo"."""
        with self.generator.given_prompts(batch.embeddings):
            policy = self.errors(
                batch, draw, losers=self.cfg.method != "sft" or indices is None
            )
            if self.cfg.method == "dpo" or indices is None:
                with torch.no_grad(), self.generator.reference():
                    reference = self.errors(batch, draw, losers=True)
        if self.cfg.method == "dpo" or indices is None:
            sigma_N = draw.sigma_N.to(policy.chosen_N.device)
            beta_N = beta_at(
                sigma_N, beta=self.cfg.beta, schedule=self.cfg.beta_schedule
            )
            found = PairTerms(*flow_dpo_terms(*policy, *reference, beta_N=beta_N))
            extra = (
                self.cfg.sft_weight * policy.chosen_N if self.cfg.sft_weight else 0.0
            )
            return found._replace(loss_N=found.loss_N + extra)
        unknown = torch.full_like(policy.chosen_N.detach(), math.nan)
        if self.cfg.method == "sft":
            return PairTerms(policy.chosen_N, unknown, unknown)
        weight_N2 = self.weight_N2[list(indices)].to(policy.chosen_N.device)
        both = (
            weight_N2[:, 0] * policy.chosen_N + weight_N2[:, 1] * policy.rejected_N
        ) / 2
        return PairTerms(both, unknown, unknown)

    def errors(self, batch: PairBatch, draw: NoiseDraw, *, losers: bool) -> Errors:
        """One forward: winners, and with ``losers`` losers behind them."""
        count, copies = len(batch.prompts), 1 + losers
        clean = (
            torch.cat([batch.chosen_NCFHW, batch.rejected_NCFHW])
            if losers
            else batch.chosen_NCFHW
        )
        noise, sigma = (
            torch.cat([draw.noise_NCFHW] * copies),
            torch.cat([draw.sigma_N] * copies),
        )
        error = self.generator.flow_error(
            clean, noise, sigma, [*batch.prompts] * copies
        )
        return Errors(
            error[:count],
            error[count:] if losers else torch.full_like(error.detach(), math.nan),
        )


def backwards_per_update(cfg: DpoConfig, ranks: int) -> int:
    """Backwards of one optimizer step on each rank. Raises ValueError when the pairs cannot be shared evenly."""
    if cfg.pairs_per_step % (ranks * cfg.micro_batch):
        raise ValueError(
            f"dpo.pairs_per_step={cfg.pairs_per_step} is over all ranks: it must be a multiple of "
            f"{ranks} ranks x dpo.micro_batch={cfg.micro_batch}"
        )
    return cfg.pairs_per_step // (ranks * cfg.micro_batch)


def summarise(rows_N4: Tensor, cfg: DpoConfig, prefix: str) -> dict[str, float]:
    """Metrics of pairs from rows (sigma, loss, chosen_change, rejected_change): MEANS over pairs, ``prefix/...``.

    accuracy is the share of pairs whose winner gained on its loser, a tie one half; push is the mean of
    |beta / 2 (d_w - d_l)|, healthy between 0.05 and 3. Loss and accuracy come for each fifth of the noise levels too.
    """
    sigma_N, loss_N, chosen_N, rejected_N = rows_N4.double().unbind(dim=1)
    metrics = {"loss": float(loss_N.mean())}
    known = bool(chosen_N.isfinite().all())
    right_N = ((chosen_N < rejected_N).double() + (chosen_N <= rejected_N).double()) / 2
    if known:
        beta_N = beta_at(sigma_N, beta=cfg.beta, schedule=cfg.beta_schedule)
        metrics |= {
            "accuracy": float(right_N.mean()),
            "chosen_change": float(chosen_N.mean()),
        }
        metrics |= {
            "rejected_change": float(rejected_N.mean()),
            "push": float((beta_N / 2 * (chosen_N - rejected_N)).abs().mean()),
        }
    for place in range(BINS):
        inside = (sigma_N * BINS).long().clamp(max=BINS - 1) == place
        if bool(inside.any()):
            name = f"sigma_{place / BINS:g}-{(place + 1) / BINS:g}"
            metrics[f"loss_{name}"] = float(loss_N[inside].mean())
            if known:
                metrics[f"accuracy_{name}"] = float(right_N[inside].mean())
    return {f"{prefix}/{key}": value for key, value in metrics.items()}
