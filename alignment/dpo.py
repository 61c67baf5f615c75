"""Train on pairs of latents: Flow-DPO (2501.13918), Flow-RWR and supervised fine-tuning.

The loop uses the Protocols of `common.types` and the files of `alignment.pair_store` only.
sigma and noise of a pair come from (seed, step, its place in the step): neither ranks nor
micro-batches change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch

from alignment.dpo_losses import DpoTerms, beta_at, flow_dpo_terms, rwr_weights
from common import faults
from common.distributed import DataRanks, seeded_generator
from common.log import say
from common.schedule import IndexSchedule
from common.updates import backward_and_step

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.config import DpoConfig
    from alignment.pair_store import PairBatch, PairSet
    from common.types import Engine, Generator

# Loss and accuracy are logged for this many intervals of the noise level.
SIGMA_BINS = 5


class NoiseDraw(NamedTuple):
    """Noise levels (N,) and noises (N, C, F, H, W) that both videos of a pair share."""

    sigma_N: Tensor
    noise_NCFHW: Tensor


class FlowErrors(NamedTuple):
    """Flow errors of the chosen and the rejected videos, (N,)."""

    chosen_N: Tensor
    rejected_N: Tensor


def steps_of(cfg: DpoConfig, pairs: int) -> int:
    """Return the optimizer steps of a run: epochs x pairs / pairs_per_step, at least 1."""
    steps = int(cfg.epochs * pairs / cfg.pairs_per_step)
    return max(1, steps)


def backwards_per_update(cfg: DpoConfig, ranks: int) -> int:
    """Return the backwards of an optimizer step on each rank.

    Ranks that compute each sample together count as one of ``ranks``. Raises ValueError when
    ranks and micro-batches do not divide ``pairs_per_step``.
    """
    together = ranks * cfg.micro_batch
    if cfg.pairs_per_step % together:
        raise ValueError(
            f"dpo.pairs_per_step={cfg.pairs_per_step} is over all ranks: it must be a multiple "
            f"of {ranks} ranks x dpo.micro_batch={cfg.micro_batch}"
        )
    return cfg.pairs_per_step // together


def draw_sigma(cfg: DpoConfig, source: torch.Generator) -> float:
    """Draw a noise level in (0, 1) by ``noise``, then shift it by ``noise_shift``."""
    if cfg.noise == "uniform":
        draw = torch.rand((), generator=source, dtype=torch.float64)
        # sigma stays inside (0, 1)
        u = min(max(float(draw), 1e-6), 1 - 1e-6)
    else:
        draw = torch.randn((), generator=source, dtype=torch.float64)
        u = float(draw.sigmoid())
    shift = cfg.noise_shift
    return shift * u / (1 + (shift - 1) * u)


class DpoLoop:
    """The training loop on pairs. Its state is the weights: a step is a function of its number.

    pairs      The pairs to train on; `use` replaces them during an online run.
    engine     It must accumulate ``backwards`` gradients before it takes a step.
    ranks_per_sample  How many consecutive ranks compute each pair together; the engine must
               then sum their gradients.
    grad_norm  Returns the gradient's norm before clipping, or None, after an optimizer step.
    accepts    Whether a noise level is one of those that are trained; others are drawn again.

    Raises ValueError when ranks and micro-batches do not divide ``pairs_per_step``, and when
    "rwr" gets pairs without values.
    """

    def __init__(
        self,
        cfg: DpoConfig,
        *,
        generator: Generator,
        engine: Engine,
        pairs: PairSet,
        seed: int,
        ranks_per_sample: int = 1,
        grad_norm: Callable[[], float | Tensor | None] = lambda: None,
        accepts: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self.cfg = cfg
        self.accepts = accepts
        self.generator = generator
        self.engine = engine
        self.seed = seed
        self.grad_norm = grad_norm
        self.ranks = DataRanks(ranks_per_sample)
        self.backwards = backwards_per_update(cfg, self.ranks.count)
        self.use(pairs)

    def use(self, pairs: PairSet) -> None:
        """Train on these pairs from now on."""
        self.pairs = pairs
        self.schedule = IndexSchedule(
            len(pairs),
            seed=self.seed,
            per_step=self.cfg.pairs_per_step,
            name="pairs",
        )
        # the weights of Flow-RWR go over all videos of the set
        if self.cfg.method == "rwr":
            values = pairs.values().flatten()
            weight = rwr_weights(values, temperature=self.cfg.temperature)
            self.weight_N2 = weight.view(-1, 2)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step: read pairs, draw noise, compute the loss, update.

        ``step`` counts from 0; the step takes ``pairs_per_step`` pairs over all ranks, and the
        metrics are over all of them. A loss that is not finite is reported; what happens to its
        gradient is decided by the engine.
        """
        scheduled = self.schedule.at(step)
        share = len(scheduled) // self.ranks.count
        first = self.ranks.index * share
        rows = []
        for start in range(first, first + share, self.cfg.micro_batch):
            # 1. Read the latents and prompt embeddings of a micro-batch.
            places = range(start, start + self.cfg.micro_batch)
            indices = [scheduled[place] for place in places]
            batch = self.pairs.read(indices)

            # 2. Draw a noise level and a noise for each pair.
            draw = self.draw(batch, "step", step, places)

            # 3. The loss of each pair by the run's method.
            faults.point("forward")
            terms = self.training_terms(batch, draw, indices)
            loss = terms.loss_N.mean()
            if not math.isfinite(float(loss.detach())):
                say(
                    f"step {step}: the loss is {float(loss.detach())} for pairs {indices}"
                )

            # 4. Backward; the engine takes the optimizer step on the last micro-batch.
            backward_and_step(self.engine, loss)
            rows.append(_metric_rows(draw, terms))

        # 5. Metrics over the pairs of all ranks.
        rows_N4 = self.ranks.gather_rows(torch.cat(rows))
        metrics = summarise(rows_N4, self.cfg, "train")
        # the engine knows the norm since its optimizer step
        norm = self.grad_norm()
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        return metrics

    @torch.no_grad()
    def evaluate(
        self,
        pairs: PairSet,
        *,
        limit: int,
    ) -> dict[str, float]:
        """Measure Flow-DPO's metrics on the first held-out pairs, MEAN over pairs: ``heldout/...``.

        The noise is the same in every evaluation. All methods are measured by the DPO loss.
        """
        rows = []
        count = min(limit, len(pairs))
        for indices in self.ranks.batches(count, self.cfg.micro_batch):
            # all ranks must call a sharded module equally often: without a pair, on the first
            places = indices or [0]
            batch = pairs.read(places)
            draw = self.draw(batch, "heldout", 0, places)
            measured_N4 = _metric_rows(draw, self.dpo_terms(batch, draw))
            rows.append(measured_N4[: len(indices)])
        # ranks may have different numbers of pairs
        pairs_N4 = torch.cat(self.ranks.gather_objects(torch.cat(rows)))
        return summarise(pairs_N4, self.cfg, "heldout")

    def draw(
        self,
        batch: PairBatch,
        name: str,
        step: int,
        places: Sequence[int],
    ) -> NoiseDraw:
        """Draw sigma and eps for each place of a step (Flow-DPO, equation 6).

        The chosen and the rejected video of a pair get the same.
        """
        shape = batch.chosen_NCFHW.shape[1:]
        sigmas = []
        noises = []
        for place in places:
            source = seeded_generator(self.seed, "dpo", name, step, place)
            sigma = draw_sigma(self.cfg, source)
            while not self.accepts(sigma):
                sigma = draw_sigma(self.cfg, source)
            sigmas.append(sigma)
            noises.append(torch.randn(shape, generator=source))
        sigma_N = torch.tensor(sigmas, dtype=torch.float32)
        return NoiseDraw(sigma_N, torch.stack(noises))

    def training_terms(
        self,
        batch: PairBatch,
        draw: NoiseDraw,
        indices: Sequence[int],
    ) -> DpoTerms:
        """Compute each pair's loss by the run's method, with grad."""
        if self.cfg.method == "dpo":
            return self.dpo_terms(batch, draw)
        with self.given(batch):
            # supervised fine-tuning: the flow error of the chosen videos
            if self.cfg.method == "sft":
                error_N = self.generator.flow_error(
                    batch.chosen_NCFHW, draw.noise_NCFHW, draw.sigma_N, batch.prompts
                )
                return _without_reference(error_N)

            # RWR: the weighted flow error of all videos
            errors = self.errors(batch, draw)
        weight_N2 = self.weight_N2[list(indices)].to(errors.chosen_N.device)
        chosen_N = weight_N2[:, 0] * errors.chosen_N
        rejected_N = weight_N2[:, 1] * errors.rejected_N
        return _without_reference((chosen_N + rejected_N) / 2)

    def dpo_terms(self, batch: PairBatch, draw: NoiseDraw) -> DpoTerms:
        """Compute each pair's DPO loss, plus ``sft_weight`` times the chosen video's error."""
        with self.given(batch):
            # the policy with grad, then the frozen reference
            policy = self.errors(batch, draw)
            with torch.no_grad(), self.generator.reference():
                reference = self.errors(batch, draw)
        sigma_N = draw.sigma_N.to(policy.chosen_N.device)
        beta_N = beta_at(
            sigma_N,
            beta=self.cfg.beta,
            schedule=self.cfg.beta_schedule,
        )
        # the loss, and what holds the chosen video's error down
        terms = flow_dpo_terms(*policy, *reference, beta_N=beta_N)
        if self.cfg.sft_weight:
            extra_N = self.cfg.sft_weight * policy.chosen_N
            terms = terms._replace(loss_N=terms.loss_N + extra_N)
        return terms

    def given(self, batch: PairBatch) -> AbstractContextManager[None]:
        """Inside, the generator uses the stored embeddings and images of these pairs."""
        if batch.images:
            return self.generator.given_prompts(batch.embeddings, batch.images)
        return self.generator.given_prompts(batch.embeddings)

    def errors(self, batch: PairBatch, draw: NoiseDraw) -> FlowErrors:
        """Compute the flow errors of both videos of each pair in one forward."""
        error = self.generator.flow_error(
            torch.cat([batch.chosen_NCFHW, batch.rejected_NCFHW]),
            torch.cat([draw.noise_NCFHW, draw.noise_NCFHW]),
            torch.cat([draw.sigma_N, draw.sigma_N]),
            [*batch.prompts, *batch.prompts],
        )
        return FlowErrors(*error.chunk(2))


def summarise(
    rows_N4: Tensor,
    cfg: DpoConfig,
    prefix: str,
) -> dict[str, float]:
    """Compute the metrics of pairs from rows (sigma, loss, chosen_change, rejected_change).

    All are MEANS over pairs, named ``prefix/...``. accuracy is the share of pairs whose chosen
    video gained on the rejected one, a tie counts one half; dpo_logit_abs is the mean of
    |beta / 2 (d_c - d_r)|, healthy between 0.05 and 3. Loss and accuracy are also given for
    each fifth of the noise levels.
    """
    sigma_N, loss_N, chosen_N, rejected_N = rows_N4.double().unbind(dim=1)
    metrics = {"loss": float(loss_N.mean())}

    # without a reference (sft, rwr) the changes are NaN and only the loss is known
    known = bool(chosen_N.isfinite().all())
    gained_N = (chosen_N < rejected_N).double()
    gained_or_tied_N = (chosen_N <= rejected_N).double()
    right_N = (gained_N + gained_or_tied_N) / 2
    if known:
        beta_N = beta_at(
            sigma_N,
            beta=cfg.beta,
            schedule=cfg.beta_schedule,
        )
        logit_N = beta_N / 2 * (chosen_N - rejected_N)
        metrics["accuracy"] = float(right_N.mean())
        metrics["chosen_change"] = float(chosen_N.mean())
        metrics["rejected_change"] = float(rejected_N.mean())
        metrics["dpo_logit_abs"] = float(logit_N.abs().mean())

    # loss and accuracy by noise level
    bin_N = (sigma_N * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
    for place in range(SIGMA_BINS):
        inside_N = bin_N == place
        if bool(inside_N.any()):
            name = f"sigma_{place / SIGMA_BINS:g}-{(place + 1) / SIGMA_BINS:g}"
            metrics[f"loss_{name}"] = float(loss_N[inside_N].mean())
            if known:
                metrics[f"accuracy_{name}"] = float(right_N[inside_N].mean())
    return {f"{prefix}/{key}": value for key, value in metrics.items()}


def _without_reference(loss_N: Tensor) -> DpoTerms:
    """The terms of a method that compares with no reference."""
    unknown_N = torch.full_like(loss_N.detach(), math.nan)
    return DpoTerms(loss_N, unknown_N, unknown_N)


def _metric_rows(draw: NoiseDraw, terms: DpoTerms) -> Tensor:
    """Rows (sigma, loss, chosen_change, rejected_change) for `summarise`, (N, 4) on the CPU."""
    columns = [draw.sigma_N]
    for term_N in terms:
        columns.append(term_N.detach().float().cpu())
    return torch.stack(columns, dim=1)
