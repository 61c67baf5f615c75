"""TODO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.schemas.evaluation import GeneratorEvaluation

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable, Row


def judge_samples(
    cfg: GeneratorEvaluation, own: list[Row], table: ResultsTable
) -> None:
    """Sample, judge and write down this rank's rows, batch by batch."""
    from common.cli import user_errors
    from common.log import progress, say
    from launch.compose import build_rewards, quiet, trained_generator
    from launch.evaluation.results_table import batches, score_fields

    quiet()
    from common.video_io import write_mp4

    say(
        f"loading the generator {cfg.generator.path} and the rewards {', '.join(cfg.rewards)}"
    )
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        rewards = build_rewards(cfg.rewards)
    folder, fps = Path(cfg.out) / "videos", cfg.generator.fps
    folder.mkdir(parents=True, exist_ok=True)
    for part in progress(
        batches(own, cfg.batch), -(-len(own) // cfg.batch), "evaluate"
    ):
        prompts = [row["prompt"] for row in part]
        clean = generator.sample(
            prompts, seeds=[row["seed"] for row in part], scheduler=cfg.scheduler
        )
        video_BTYXC = generator.decode(clean)
        scores = {
            name: reward.score(video_BTYXC, prompts, fps=fps)
            for name, reward in rewards.items()
        }
        for b, row in enumerate(part):
            row |= score_fields(scores, b) | {"video": None}
            if row["index"] < cfg.keep_videos:
                row["video"] = f"videos/{row['index']:04d}.mp4"
                write_mp4(
                    Path(cfg.out) / row["video"], video_BTYXC[b], fps, crf=cfg.crf
                )
        table.add(part)


def summarise(rows: Sequence[Row], *, seed: int, resamples: int) -> dict[str, Any]:
    """{reward: interval, "reward.part": interval}: MEAN and bootstrap over prompts, unjudged ones counted."""
    from launch.evaluation.intervals import mean_ci95

    columns = {
        name: [row["rewards"].get(name) for row in rows]
        for name in _names(row["rewards"] for row in rows)
    }
    for name in _names(row["parts"] for row in rows):
        found = [row["parts"].get(name, {}) for row in rows]
        columns |= {
            f"{name}.{part}": [parts.get(part) for parts in found]
            for part in _names(found)
        }
    return {
        name: mean_ci95(values, seed=seed, resamples=resamples).as_dict()
        for name, values in columns.items()
    }


def _names(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(name for one in dicts for name in one))
