"""Held-out evaluation and sample videos of a GRPO run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from common.distributed import is_main
from launch.evaluation.heldout import gap_of_map, means_of, score_heldout
from launch.evaluation.samples import SampleWriter, rows_of_step

if TYPE_CHECKING:
    from alignment.grpo import GrpoLoop, StepResult
    from common.log import RunLog
    from common.types import Prompt
    from engine.ema import Ema
    from launch.schemas.training import GrpoRun
    from launch.training.guards import RunGuards


def evaluate_heldout(
    run: GrpoRun,
    loop: GrpoLoop,
    ema: Ema | None,
    prompts: list[Prompt],
    step: int,
    *,
    guards: RunGuards | None = None,
) -> dict[str, float]:
    """Measure the generator on held-out prompts before a step, where it is due.

    ``guards`` see the rewards of every prompt, and add their metrics.
    It is due every ``evaluation.every`` steps and after the last step. With an average of
    the weights, the average is measured.
    """
    settings = run.evaluation
    if settings is None:
        return {}
    if step % settings.every and step != run.steps:
        return {}
    # With an average, the average is used later, so the average is measured.
    with nullcontext() if ema is None else ema.swapped_in():
        rows = score_heldout(
            loop.generator,
            loop.rewards,
            prompts,
            seed=run.seed,
            stock=settings.stock_scheduler,
            folder=Path(run.run_dir) / "evaluation" / f"step-{step:06d}",
            videos=settings.videos,
            steps=settings.steps,
            usual_guidance=run.other_guidance,
        )
        gap = gap_of_map(loop.generator, prompts, seed=run.seed)
    metrics = means_of(rows) | gap
    if guards is not None:
        metrics |= guards.after_evaluation(rows["eval"])
    return metrics


def groups_to_write(run: GrpoRun, step: int) -> int:
    """How many of this rank's groups `write_samples` writes at a step."""
    if not is_main() or not run.video_every:
        return 0
    if step % run.video_every and step + 1 != run.steps:
        return 0
    return run.video_groups


def write_samples(run: GrpoRun, result: StepResult, step: int, log: RunLog) -> None:
    """Write the videos of rank 0's first groups with their rewards, where it is due."""
    if not groups_to_write(run, step):
        return

    # The files.
    rows = list(rows_of_step(result, step=step, groups=run.video_groups))
    folder = Path(run.run_dir) / "samples" / f"step-{step:06d}"
    writer = SampleWriter(folder, fps=run.generator.fps)
    # Those of the VAE. None where other ranks score all of this rank's groups.
    video_BTYXC = result.shown_BTYXC
    if video_BTYXC is None:
        video_BTYXC = result.video_BTYXC
    if video_BTYXC is not None:
        # A diagnosis may have kept more groups.
        writer.add(video_BTYXC[: len(rows)], rows)

    # The trackers.
    captions = []
    for row in rows:
        rewards = ", ".join(f"{name} {value}" for name, value in row["rewards"].items())
        captions.append(f"{row['prompt']} | {rewards}")
    log.videos(step, sorted(folder.glob("*.mp4")), captions)
