"""Films VBench's prompts under the names VBench looks for.

out/videos/{prompt}-{index}.mp4   nothing else lies there: VBench takes the ending of all names from the first it finds
out/samples.jsonl                 a row a video: file, prompt, index, what the generator read, seed, adapter
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.evaluation.sampling import SampleRequest
    from launch.schemas.vbench import VbenchSampleRun
    from launch.vbench_eval.suite import SuiteVideo

NOT_IN_A_VIDEO = (
    "out",
    "info",
    "limit",
    "dimensions",
    "videos",
    "flickering",
)  # settings that change no video


def sample_vbench(cfg: VbenchSampleRun, *, resume: str = "auto") -> None:
    """All videos of the suite that are not there yet, then samples.jsonl in the suite's order."""
    from common.cli import exit_with_error, user_errors
    from launch.evaluation.results_table import all_ranks
    from launch.evaluation.sampling import open_table, sample_videos
    from launch.vbench_eval.suite import read_rewritten, read_suite

    with all_ranks():
        from common.distributed import from_main, is_main
        from common.log import say

        with user_errors():
            suite = read_suite(cfg.info)
            prompts = suite.prompts(cfg.dimensions)[: cfg.limit]
            texts = (
                read_rewritten(cfg.augmented, prompts)
                if cfg.augmented
                else {prompt: prompt for prompt in prompts}
            )
            inputs = {"info": suite.path, "augmented": cfg.augmented}
            table = open_table(cfg, inputs, without=NOT_IN_A_VIDEO, resume=resume)
        folder = Path(cfg.out) / "videos"
        if problem := from_main(prepare(cfg, folder) if is_main() else None):
            exit_with_error(problem)
        kind = (
            "the standard suite"
            if suite.is_standard
            else f"NOT the standard suite: {suite.path}"
        )
        wanted = suite.videos(prompts, each=cfg.videos, flickering=cfg.flickering)
        shots = [shot(cfg, video, texts[video.prompt]) for video in wanted]
        sample_videos(
            cfg, shots, folder, table, what=f"{kind}: {len(prompts)} prompts, "
        )
        # what earlier runs made of other prompts stays in the table
        whole = suite.videos(suite.prompts(), each=100, flickering=100)
        made = table.done | {(video.name,) for video in wanted}
        table.finish([key for video in whole if (key := (video.name,)) in made])
        say(f"{len(wanted)} videos in {folder}")


def prepare(cfg: VbenchSampleRun, folder: Path) -> str | None:
    """Make the folder, with config.yaml beside it; a problem, or None."""
    from common.config import dump
    from launch.vbench_eval.suite import strangers

    folder.mkdir(parents=True, exist_ok=True)
    dump(cfg, cfg.out)
    return strangers(folder)


def shot(cfg: VbenchSampleRun, video: SuiteVideo, text: str) -> SampleRequest:
    """What is filmed for it; the seed does not depend on a rewritten prompt."""
    from common.distributed import derive_seed
    from launch.evaluation.sampling import SampleRequest

    seed = derive_seed(cfg.seed, "vbench", video.prompt, video.index)
    return SampleRequest(
        video.name,
        text,
        seed,
        {"prompt": video.prompt, "index": video.index, "text": text},
    )
