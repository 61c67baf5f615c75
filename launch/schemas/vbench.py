"""Schemas of `launch/sample.py vbench` and `launch/evaluate.py vbench`. No torch."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from common.schema import PositiveFloat, PositiveInt, run_config
from generator.config import GeneratorConfig
from launch.schemas.training import Crf, Scheduler
from launch.vbench_eval.suite import DIMENSIONS, INDICES

# Arguments of VBench.evaluate that this program computes.
COMPUTED_OPTIONS = {"videos_path", "name", "dimension_list", "mode", "prompt_list"}


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


@run_config
class VbenchEvaluation:
    """VBench's scores of the videos of one or several models, in one table.

    videos         model -> folder of its videos; the others are compared with the first.
    python         interpreter of an environment with the `vbench` package; null is this one.
    info           the file that the videos were sampled from; null is the package's.
    dimensions     which dimensions; quality, semantic and total need all of theirs.
    static_filter  score temporal_flickering on the videos that VBench's filter finds static,
                   as its README asks.
    flickering     videos per prompt of temporal_flickering that the filter needs.
    missing        missing videos: "refuse" to start, or "leave_out" their dimensions.
    device         where VBench's models run; its static filter knows "cuda" only.
    options        further arguments of VBench.evaluate: local,
                   imaging_quality_preprocessing_mode.
    env            environment variables of VBench's processes: VBENCH_CACHE_DIR, proxies.
    timeout_s      for one dimension of one model.
    """

    out: str
    videos: Annotated[dict[str, str], Field(min_length=1)]
    python: str | None = None
    info: str | None = None
    dimensions: Dimensions = DIMENSIONS
    static_filter: bool = True
    flickering: Annotated[int, Field(ge=INDICES)] = 25
    missing: Literal["refuse", "leave_out"] = "refuse"
    device: str = "cuda"
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    timeout_s: PositiveFloat = 24 * 3600.0

    def __post_init__(self) -> None:
        for name in self.videos:
            # The name becomes a folder.
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"videos: {name!r} may only hold letters, digits and . _ + -"
                )
        computed = sorted(COMPUTED_OPTIONS & set(self.options))
        if computed:
            raise ValueError(f"options: {', '.join(computed)} are set by this program")
