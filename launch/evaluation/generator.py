"""Sample and score the rows of `launch/evaluate.py generator`, and summarise them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.rewards.errors import contained_score
from launch.schemas.evaluation import GeneratorEvaluation

if TYPE_CHECKING:
    from common.types import Prompt
    from launch.evaluation.results_table import ResultsTable, Row


def score_samples(
    cfg: GeneratorEvaluation,
    prompts: Sequence[Prompt],
    rows: list[Row],
    table: ResultsTable,
) -> None:
    """Sample and score this rank's rows, batch by batch, and add them to the table.

    Rows have the "index" of their prompt, and "seed".
    """
    from common import progress as phases
    from common.cli import user_errors
    from common.log import say
    from common.types import text_of
    from launch.compose import (
        build_rewards,
        check_takes_images,
        quiet,
        trained_generator,
    )
    from launch.evaluation.results_table import batches, score_fields

    quiet()
    from common.video_io import write_mp4
    from generator.latents import require_finite_latents

    # Load the models.
    names = ", ".join(cfg.rewards)
    say(f"loading the generator {cfg.generator.source} and the rewards {names}")
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        check_takes_images(cfg.generator, generator, prompts)
        rewards = build_rewards(cfg.rewards)
    folder = Path(cfg.out) / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    fps = cfg.generator.fps
    for batch in batches(rows, cfg.batch, "evaluate"):
        # Sample the batch and score it with every reward.
        some = [prompts[row["index"]] for row in batch]
        texts = [text_of(prompt) for prompt in some]
        seeds = [row["seed"] for row in batch]
        phases.enter("sampling")
        clean = generator.sample(some, seeds=seeds, scheduler=cfg.scheduler)
        with user_errors():
            require_finite_latents(clean, texts, seeds)
        phases.enter("decode")
        video_BTYXC = generator.decode(clean)
        scores = {}
        for name, reward in rewards.items():
            phases.enter(f"score/{name}")
            scores[name] = contained_score(reward, video_BTYXC, texts, fps=fps)

        # Complete the rows, and keep the first videos of the run.
        for b, row in enumerate(batch):
            row |= score_fields(scores, b)
            row["video"] = None
            index = row["index"]
            if index < cfg.keep_videos:
                path = folder / f"{index:04d}.mp4"
                write_mp4(path, video_BTYXC[b], fps, crf=cfg.crf)
                row["video"] = f"videos/{path.name}"
        table.add(batch)


def summarise(
    rows: Sequence[Row],
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """MEAN of every reward and its parts over prompts, with a bootstrap interval.

    {reward: interval, "reward.part": interval}. Videos that could not be scored are counted as
    missing.
    """
    from launch.evaluation.intervals import mean_ci95

    summary = {}
    for name, values in columns([flatten_scores(row) for row in rows]).items():
        interval = mean_ci95(values, seed=seed, resamples=resamples)
        summary[name] = interval.as_dict()
    return summary


def columns(flat_rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Turn rows of `flatten_scores` into columns, in order of first appearance."""
    names = dict.fromkeys(name for flat in flat_rows for name in flat)
    return {name: [flat.get(name) for flat in flat_rows] for name in names}


def flatten_scores(row: Row) -> Row:
    """{reward: value, "reward.part": value} of a row with `score_fields`."""
    flat = dict(row["rewards"])
    for name, parts in row["parts"].items():
        for part, value in parts.items():
            flat[f"{name}.{part}"] = value
    return flat
