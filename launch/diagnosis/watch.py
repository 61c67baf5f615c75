"""Watch a GRPO run while it trains: measure its first updates, and say what is off.

The measurements go to measurements.jsonl in the run's folder, which `launch/diagnose.py` reads.
No measurement draws from a global random generator or changes a weight, so that a run is the same
with and without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from alignment.grpo_losses import weights_of_steps
from common.distributed import derive_seed, is_main, rank, world_size
from common.files import append_line, replace_text
from common.log import say
from common.run_record import plain
from common.types import Score
from launch.diagnosis import (
    batch_measures,
    generator_measures,
    loss_measures,
    reward_measures,
    score_measures,
    update_measures,
)
from launch.diagnosis.certificates import certificate_of
from launch.diagnosis.evidence import MEASUREMENTS, START, Evidence, Row
from launch.diagnosis.own_route import OwnRoute
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import folder_facts, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import GrpoLoop, StepResult
    from alignment.prompts import PromptBatch
    from engine.ema import Ema
    from generator.wan import WanGenerator
    from launch.schemas.training import GrpoRun

Measure = Callable[..., Row]
# Videos of a step that are kept for the rewards.
KEPT_VIDEOS = 16
# Weights beyond this number are not copied: 1.6 GB in fp32.
MOST_TRAINED = 400_000_000
# The rules are applied after each of so many steps, then after every so many.
OFTEN = 20


class Watch:
    """Measures the first updates of a run. All ranks hold one and call every method.

    Ranks that share weights, groups or samples (ZeRO 3, ``ranks_per_group``,
    ``context_parallel``) must all call the transformer equally often: their runs are judged by
    settings and metrics alone.
    """

    def __init__(
        self,
        run: GrpoRun,
        loop: GrpoLoop,
        heldout: Sequence[str],
        ema: Ema | None = None,
    ) -> None:
        self.run = run
        self.loop = loop
        self.ema = ema
        self.heldout = list(heldout)
        self.settings = plain(run)
        self.file = Path(run.run_dir) / MEASUREMENTS
        self.facts = folder_facts(self.settings)
        self.certificate = certificate_of(self.settings)
        self.metrics: list[dict[str, float]] = []
        self.told: set[str] = set()
        self.before: PromptBatch | None = None
        self.samples_before: set[str] = set()
        # measured are the steps from the start of this process up to this one
        self.until = 0

    def prepare(self, start: int) -> None:
        """Before the first step: remember embeddings, weights, and what was measured before."""
        config = self.run.diagnosis
        if config is None:
            return
        if is_main():
            self._keep_rows_before(start)
        if not config.updates or not self._can_measure():
            return
        self.until = start + config.updates

        # The text encoder may be freed before the first step.
        prompts = self._evaluated_prompts()
        for step in range(start, min(self.until, self.run.steps)):
            batch = self.loop.batch(step)
            prompts += batch.prompts[:1]
            prompts += batch.prompts[-1:]
        self.own = OwnRoute(self.loop.generator, prompts)
        # What the update does to the weights, and what rewards get.
        module = self.loop.generator.module
        self.gradients = update_measures.GradientRecorder(module)
        self.weights = update_measures.WeightRecorder(module)
        self.weights_at_start = {} if self.ema is None else self.weights.before
        self.recorders = reward_measures.record(self.loop.rewards)
        if start == 0:
            self._measure_start()

    def _measure_start(self) -> None:
        """The generator before any update: self-checks may end the run right after."""
        batch = self.loop.batch(0)
        prompt = batch.prompts[-1]
        row = {"step": START}
        row |= self._if_possible(generator_measures.cut_prompts, self.own)
        row |= self._if_possible(
            generator_measures.replay,
            self.own,
            prompt,
            batch.seeds[-1],
            other=self.own.another(prompt, batch.prompts[:1]),
            step=0,
        )
        if is_main():
            append_line(self.file, _line(row).rstrip("\n"))
            if self.run.diagnosis.said:
                self._say()

    def _can_measure(self) -> bool:
        """False where ranks share samples or weights, or copies of the weights are too large.

        There is no other route to the numbers of a generator that is not a text-to-video Wan.
        """
        run = self.run
        if run.generator.target is not None:
            return False
        # Videos of an ODE solver have no density.
        if run.grpo.objective != "policy":
            return False
        # Nor for two transformers, for prompts with an image, or for the jumps of a flow map.
        family = self.loop.generator.family
        other = family.boundary is not None or family.flow_map
        if other or family.image != "none":
            return False
        shared = run.grpo.ranks_per_group * run.generator.context_parallel > 1
        if shared or run.zero_stage == 3:
            return False
        weights = update_measures.trained(self.loop.generator.module).values()
        return sum(weight.numel() for weight in weights) <= MOST_TRAINED

    def _keep_rows_before(self, start: int) -> None:
        """A resumed run goes on after what it has measured."""
        kept = []
        for row in rows_of(self.file):
            if start > 0 and row["step"] < start:
                kept.append(_line(row))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if kept or self.file.is_file():
            replace_text(self.file, "".join(kept))

    def measures(self, step: int) -> bool:
        """True if this update is measured."""
        return step < self.until

    def groups_to_keep(self, step: int) -> int:
        """How many groups' videos a step keeps for the measurements."""
        if not self.measures(step):
            return 0
        return max(2, math.ceil(KEPT_VIDEOS / self.loop.ranks.members))

    def begin(self, step: int) -> None:
        """Begin a step."""
        if not self.measures(step):
            return
        self.gradients.start()
        for recorder in self.recorders.values():
            recorder.forget()

    def look(self, step: int, result: StepResult, metrics: Mapping[str, float]) -> None:
        """Measure an update after its optimizer step, and say what is off."""
        if self.run.diagnosis is None:
            return
        row: dict[str, float] = {"step": step}
        if self.measures(step):
            row |= self._measure(step, result)
            if is_main():
                append_line(self.file, _line(row).rstrip("\n"))
        if step + 1 == self.until:
            self._release()

        # The rules of launch/diagnose.py, on what there is until now.
        if is_main() and self.run.diagnosis.said:
            self.metrics.append({"step": step, **metrics})
            if step < OFTEN or step % OFTEN == 0:
                self._say()

    def _measure(self, step: int, result: StepResult) -> dict[str, float]:
        """Everything about one update. All ranks must call this."""
        known = self.loop.prompts.prompts
        row = batch_measures.repeats(result.batch, self.before, known)
        row |= batch_measures.heldout(self.heldout, known)
        row["ranks"] = world_size()
        self.before = result.batch
        numbers, self.samples_before = batch_measures.samples(
            result.groups, self.samples_before
        )
        row |= numbers
        # 1. What the update did.
        row |= self._update(step, result)
        # 2. The generator, once more and by another route.
        row |= self._generator(step, result)
        # 3. The rewards: what they got, and how they answer.
        if is_main():
            row |= self._if_possible(self._rewards, result)
        return row

    def _if_possible(self, measure: Measure, *args: Any, **options: Any) -> Row:
        """What a measurement of this rank alone finds; an error in it must not end the run."""
        try:
            return measure(*args, **options)
        except (RuntimeError, ValueError, TypeError) as error:
            first = str(error).partition("\n")[0]
            say(f"diagnosis: {measure.__name__} cannot be measured: {first:.200}")
            return {}

    def _update(self, step: int, result: StepResult) -> dict[str, float]:
        """Gradient, weights, and what became more likely."""
        loop = self.loop
        row = {"gradient/norm": self.gradients.norm()}
        old = self.weights.before
        self.own.before = partial(self.weights.put_back, old)
        row |= self.weights.look(self.gradients.total, rate=self._rate(step))
        row |= loss_measures.gain(
            loop.generator,
            loop.cfg,
            result.groups,
            result.advantage_PM,
        )
        # A normalized ratio scales the gradient of each member.
        if loop.cfg.ratio == "normalized":
            return row
        # The first backward, at the weights that it had.
        weights = weights_of_steps(
            [step for group in result.groups for step in group.steps],
            form=loop.cfg.reweight,
            normalize=loop.cfg.normalize_step_weights,
        )
        with self.weights.put_back(old):
            row |= self._if_possible(
                loss_measures.loss_terms,
                loop.generator,
                loop.generator.module,
                loop.cfg,
                result.groups[0],
                result.advantage_PM[0],
                weights[0],
                self.gradients.first,
            )
        return row

    def _generator(self, step: int, result: StepResult) -> dict[str, float]:
        """Rollout, update, decoding, and after the last measured update the evaluation."""
        prompt = result.batch.prompts[-1]
        other = self.own.another(prompt, result.batch.prompts[:1])
        row = self._if_possible(
            generator_measures.replay,
            self.own,
            prompt,
            result.batch.seeds[-1],
            other=other,
            step=step,
        )
        # Latents of the policy before this update: those of the first are the base model's.
        clean_GCFHW = result.groups[-1].clean_GCFHW
        some_GCFHW = clean_GCFHW[: generator_measures.MEMBERS]
        row |= self._if_possible(generator_measures.decoding, self.own, some_GCFHW)
        # The last group whose videos were kept; those of a small decoder are not the VAE's.
        video_BTYXC = result.video_BTYXC
        if video_BTYXC is not None and not self.loop.has_scoring_decoder:
            members = self.loop.ranks.members
            place = len(video_BTYXC) // members - 1
            first = place * members
            row |= self._if_possible(
                generator_measures.scored,
                self.own,
                video_BTYXC[first : first + generator_measures.MEMBERS],
                result.groups[place].clean_GCFHW[: generator_measures.MEMBERS],
            )
        if step + 1 == min(self.until, self.run.steps):
            row |= self._evaluation(step)
            if self.ema is not None:
                row |= update_measures.follows(
                    self.ema.average, self.weights_at_start, self.weights.before
                )
        return row

    def _rewards(self, result: StepResult) -> dict[str, float]:
        """The rewards of this rank's videos, by ``rewards/NAME/``."""
        fps = self.run.generator.fps
        row = {}
        # Rewards that count under a condition have no sum to compare with.
        if not self.loop.cfg.reward_given:
            row["advantage/sign"] = score_measures.advantage_sign(
                result.scores,
                self.loop.weights,
                result.advantage_PM,
            )
        row["advantage/off_centre"] = score_measures.off_centre(result.advantage_PM)
        for name, score in result.scores.items():
            recorder = self.recorders[name]
            found = score_measures.shape_of_scores(score)
            found |= reward_measures.received(recorder, result, fps=fps)
            # A reward of whole groups cannot score a single video.
            if not self.loop.rewards[name].group_level:
                found |= score_measures.answers(recorder, score, result, fps=fps)
            for key, value in found.items():
                row[f"rewards/{name}/{key}"] = value
        return row

    def _evaluation(self, step: int) -> dict[str, float]:
        """Let the evaluation of the run measure two prompts, and look at what it samples."""
        from dataclasses import replace

        from launch.schemas.training import EvaluationConfig
        from launch.training import grpo_outputs

        # Prompts that nobody has encoded cannot be sampled once the text encoder is freed.
        prompts = self._evaluated_prompts()
        freed = self.run.cache_prompts and not self.heldout
        if freed or not self.own.knows(*prompts):
            return {}
        # The evaluation as the run makes it, with a reward that keeps the videos.
        settings = EvaluationConfig(prompts="", every=1, videos=0)
        run = replace(self.run, evaluation=settings)
        generator = self.loop.generator
        spy = _VideoSpy(generator)
        loop = SimpleNamespace(generator=generator, rewards={"spy": spy})
        grpo_outputs.evaluate_heldout(run, loop, None, prompts, step)
        if not spy.videos or rank() != 0:
            return {}

        # The first prompt's video, by the own route.
        found = generator_measures.evaluation(
            self.own,
            spy.videos[0][:1],
            prompts[0],
            derive_seed(self.run.seed, "evaluate", 0),
            other=self.own.another(prompts[0], prompts),
        )
        found["evaluation/fps_ratio"] = spy.fps / self.run.generator.fps
        found["evaluation/guidance"] = spy.guidance
        return found

    def _evaluated_prompts(self) -> list[str]:
        return (self.heldout or list(self.loop.prompts.prompts))[:2]

    def _rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        optimizer = self.run.optimizer
        return optimizer.lr * optimizer.rate_share(step + 1)

    def _release(self) -> None:
        self.gradients.close()
        reward_measures.release(self.loop.rewards)
        self.until = 0

    def _say(self) -> None:
        """Say every accusation once."""
        evidence = Evidence(
            settings=self.settings,
            metrics=self.metrics,
            measurements=rows_of(self.file),
            facts=self.facts,
            certificate=self.certificate,
        )
        for diagnosis in diagnose(evidence):
            # What is only worth knowing waits for the report.
            if not diagnosis.accuses or diagnosis.cause in self.told:
                continue
            self.told.add(diagnosis.cause)
            say(f"diagnosis, {diagnosis.line}")


class _VideoSpy:
    """A reward that keeps the videos that it is given, and scores all of them 0."""

    name = "spy"
    group_level = False

    def __init__(self, generator: WanGenerator) -> None:
        self.generator = generator
        self.videos = []
        self.fps = math.nan
        self.guidance = math.nan

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        self.videos.append(video_BTYXC)
        self.fps = fps
        self.guidance = self.generator.cfg.sampler.guidance_scale
        return Score(torch.zeros(len(prompts)))


def _line(row: Mapping[str, float]) -> str:
    """A row as a line of JSON, which has no NaN."""
    values = {}
    for name, value in row.items():
        values[name] = value if math.isfinite(value) else None
    return json.dumps(values) + "\n"
