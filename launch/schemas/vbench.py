"""Schemas of `launch/sample.py vbench` and `launch/evaluate.py vbench`. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from common.schema import PositiveInt, run_config
from generator.config import GeneratorConfig, check_one_rank_per_video
from launch.schemas.training import Crf, Scheduler
from launch.vbench_eval.suite import DIMENSIONS, INDICES


def _check_dimensions(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(
                f"dimensions: VBench has no {name!r}; it has {', '.join(DIMENSIONS)}"
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"dimensions must name at least one dimension and none twice, got {list(names)}"
        )
    return names


Dimensions = Annotated[tuple[str, ...], AfterValidator(_check_dimensions)]
VideosPerPrompt = Annotated[int, Field(ge=1, le=100)]


@run_config
class VbenchSampleRun:
    """Videos of VBench's standard prompts, as out/videos/{prompt}-{index}.mp4.

    info        path of VBench_full_info.json; null takes that of an installed `vbench`.
    augmented   .jsonl of {"prompt": ..., "augmented": ...}: the generator reads the second,
                files are named after the first; null samples the prompts unchanged.
    adapter     folder of a trained adapter; null samples the generator without. Seeds are
                the same, so that videos can be compared pair by pair.
    seed        video k of a prompt has the seed derive_seed(seed, "vbench", prompt, k).
    videos      per prompt; VBench reads the first five.
    flickering  videos per prompt of temporal_flickering, before its filter.
    dimensions  sample only the prompts of these dimensions.
    limit       and of those only the first.
    """

    out: str
    generator: GeneratorConfig
    info: str | None = None
    augmented: str | None = None
    adapter: str | None = None
    seed: int = 0
    videos: VideosPerPrompt = INDICES
    flickering: VideosPerPrompt = 25
    dimensions: Dimensions = DIMENSIONS
    limit: PositiveInt | None = None
    scheduler: Scheduler = "euler"
    crf: Crf = 12

    def __post_init__(self) -> None:
        check_one_rank_per_video(self.generator)


@run_config
class VbenchEvaluation:
    """A table of the scores that VBench gave the videos of one or several models.

    results     model -> folder of VBench's *_eval_results.json files; the other models are
                compared with the first.
    dimensions  which dimensions; quality, semantic and total need all of theirs.
    """

    out: str
    results: Annotated[dict[str, str], Field(min_length=1)]
    dimensions: Dimensions = DIMENSIONS
