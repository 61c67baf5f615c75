"""Sample and score the rows of `launch/evaluate.py generator`, and summarise them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.schemas.evaluation import GeneratorEvaluation

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable, Row


def score_samples(
    cfg: GeneratorEvaluation, rows: list[Row], table: ResultsTable
) -> None:
    """Sample and score this rank's rows, batch by batch, and add them to the table."""
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_rewards, quiet, trained_generator
    from launch.evaluation.results_table import batches, score_fields

    quiet()
    from common.video_io import write_mp4

    names = ", ".join(cfg.rewards)
    say(f"loading the generator {cfg.generator.path} and the rewards {names}")
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        rewards = build_rewards(cfg.rewards)
    out = Path(cfg.out)
    fps = cfg.generator.fps
    (out / "videos").mkdir(parents=True, exist_ok=True)
    for batch in batches(rows, cfg.batch, "evaluate"):
        # Sample the batch and score it with every reward.
        prompts = [row["prompt"] for row in batch]
        seeds = [row["seed"] for row in batch]
        clean = generator.sample(prompts, seeds=seeds, scheduler=cfg.scheduler)
        video_BTYXC = generator.decode(clean)
        scores = {}
        for name, reward in rewards.items():
            scores[name] = reward.score(video_BTYXC, prompts, fps=fps)

        # Keep the first videos of the run, then the rows.
        for b, row in enumerate(batch):
            row |= score_fields(scores, b)
            row["video"] = None
            if row["index"] < cfg.keep_videos:
                row["video"] = f"videos/{row['index']:04d}.mp4"
                write_mp4(out / row["video"], video_BTYXC[b], fps, crf=cfg.crf)
        table.add(batch)


def summarise(rows: Sequence[Row], *, seed: int, resamples: int) -> dict[str, Any]:
    """{reward: interval, "reward.part": interval}: MEAN over prompts with its bootstrap.

    Videos that could not be scored are counted as missing.
    """
    from launch.evaluation.intervals import mean_ci95

    flat_rows = [flatten_scores(row) for row in rows]
    summary = {}
    for name in dict.fromkeys(name for flat in flat_rows for name in flat):
        values = [flat.get(name) for flat in flat_rows]
        summary[name] = mean_ci95(values, seed=seed, resamples=resamples).as_dict()
    return summary


def flatten_scores(row: Row) -> Row:
    """{reward: value, "reward.part": value} of a row with `score_fields`."""
    flat = dict(row["rewards"])
    for name, parts in row["parts"].items():
        for part, value in parts.items():
            flat[f"{name}.{part}"] = value
    return flat
