"""Schemas of VBench's two commands: `launch/sample.py vbench` and `launch/evaluate.py vbench`. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import check
from generator.config import GeneratorConfig
from launch.vbench_eval.suite import DIMENSIONS, INDICES


@dataclass(frozen=True)
class VbenchSampleRun:
    """VBench's standard prompts, filmed: out/videos/{prompt}-{index}.mp4, and what each was made from in samples.jsonl.

    info        path of VBench_full_info.json; null is that of an installed `vbench` package
    augmented   .jsonl of {"prompt": ..., "augmented": ...}: the generator reads the second, files are called by the
                first; null samples the prompts as they are
    adapter     folder of a trained adapter, null for the generator as it is; the same seeds, so videos compare in pairs
    seed        video k of a prompt has seed derive_seed(seed, "vbench", prompt, k)
    videos      of a prompt; VBench looks at the first five
    flickering  of a prompt of temporal_flickering, before its filter of static videos
    dimensions  film only the prompts of these
    limit       and of those only the first
    """

    out: str
    generator: GeneratorConfig
    info: str | None = None
    augmented: str | None = None
    adapter: str | None = None
    seed: int = 0
    videos: int = INDICES
    flickering: int = 25
    dimensions: tuple[str, ...] = DIMENSIONS
    limit: int | None = None
    scheduler: Literal["euler", "pipeline"] = "euler"
    crf: int = 12

    def __post_init__(self) -> None:
        problems = _dimension_problems(self.dimensions)
        if not 1 <= self.videos <= 100:
            problems.append(f"videos must be in 1..100, got {self.videos}")
        if not 1 <= self.flickering <= 100:
            problems.append(f"flickering must be in 1..100, got {self.flickering}")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit must be at least 1 or null, got {self.limit}")
        if not 0 <= self.crf <= 51:
            problems.append(f"crf must be in 0..51, got {self.crf}")
        check("VbenchSampleRun", problems)


@dataclass(frozen=True)
class VbenchEvaluation:
    """VBench's own judges on the videos of one or several models, one table beside another.

    videos         model -> folder of its videos; others are compared with the first
    python         interpreter of an environment that has the `vbench` package; null is this one
    info           the file the videos were sampled from; null is that of the package
    dimensions     what is judged; quality, semantic and total need all of theirs
    static_filter  judge temporal_flickering on the videos that VBench's filter finds static, as its README asks
    flickering     videos of a prompt of temporal_flickering that must be there for the filter
    missing        videos that are not there: refuse to start, or leave_out the dimensions that lack any
    device         where VBench's models run; its static filter knows "cuda" only
    options        further keyword arguments of VBench.evaluate: local, imaging_quality_preprocessing_mode
    env            further environment variables of VBench's processes: VBENCH_CACHE_DIR, proxies
    timeout_s      of one dimension of one model
    """

    out: str
    videos: dict[str, str]
    python: str | None = None
    info: str | None = None
    dimensions: tuple[str, ...] = DIMENSIONS
    static_filter: bool = True
    flickering: int = 25
    missing: Literal["refuse", "leave_out"] = "refuse"
    device: str = "cuda"
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 24 * 3600.0

    def __post_init__(self) -> None:
        problems = _dimension_problems(self.dimensions)
        if not self.videos:
            problems.append("videos must name at least one model's folder, got none")
        problems += [
            f"videos: {name!r} is no plain name"
            for name in self.videos
            if not re.fullmatch(r"[\w.+-]+", name)
        ]
        if self.flickering < INDICES:
            problems.append(
                f"flickering must be at least {INDICES}, got {self.flickering}"
            )
        if self.timeout_s <= 0:
            problems.append(f"timeout_s must be positive, got {self.timeout_s}")
        taken = sorted(
            {"videos_path", "name", "dimension_list", "mode", "prompt_list"}
            & set(self.options)
        )
        if taken:
            problems.append(f"options: {', '.join(taken)} are set by this program")
        check("VbenchEvaluation", problems)


def _dimension_problems(names: tuple[str, ...]) -> list[str]:
    problems = [f"dimensions: VBench has no {name!r}; it has {', '.join(DIMENSIONS)}" for name in names
                if name not in DIMENSIONS]  # fmt: skip
    if not names or len(set(names)) < len(names):
        problems.append(
            f"dimensions must name at least one, each once, got {list(names)}"
        )
    return problems
