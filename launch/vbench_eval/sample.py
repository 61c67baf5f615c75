"""Sample VBench's prompts under the file names that VBench looks for.

out/videos/{prompt}-{index}.mp4  videos only: VBench takes the ending of all names from a file
out/samples.jsonl                a row per video: file, prompt, index, text, seed, adapter
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.evaluation.sampling import SampleRequest
    from launch.schemas.vbench import VbenchSampleRun
    from launch.vbench_eval.suite import SuiteVideo

# Settings that change no video.
NOT_IN_A_VIDEO = (
    "out",
    "info",
    "limit",
    "dimensions",
    "videos",
    "flickering",
)


def sample_vbench(cfg: VbenchSampleRun, *, resume: str = "auto") -> None:
    """Sample the missing videos of the suite, then order samples.jsonl as the suite is."""
    from common.cli import exit_with_error, user_errors
    from common.config import dump
    from launch.evaluation.results_table import all_ranks
    from launch.evaluation.sampling import keep_earlier, open_table, sample_videos
    from launch.vbench_eval.suite import read_rewritten, read_suite, strangers

    with all_ranks(folder=cfg.out):
        from common.distributed import from_main, is_main
        from common.log import say

        # Prompts, and the texts that the generator reads for them.
        with user_errors():
            suite = read_suite(cfg.info)
            prompts = suite.prompts(cfg.dimensions)[: cfg.limit]
            texts = {prompt: prompt for prompt in suite.prompts()}
            if cfg.augmented:
                texts |= read_rewritten(cfg.augmented, prompts)
            inputs = {"info": suite.path, "augmented": cfg.augmented}
            table = open_table(cfg, inputs, without=NOT_IN_A_VIDEO, resume=resume)
        folder = Path(cfg.out) / "videos"
        problem = None
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            dump(cfg, cfg.out)
            problem = strangers(folder)
        problem = from_main(problem)
        if problem:
            exit_with_error(problem)

        # Sample the missing videos.
        kind = f"NOT the standard suite: {suite.path}"
        if suite.is_standard:
            kind = "the standard suite"
        videos = suite.videos(prompts, each=cfg.videos, flickering=cfg.flickering)
        requests = [request_of(cfg, video, texts[video.prompt]) for video in videos]
        what = f"{kind}: {len(prompts)} prompts, "
        sample_videos(cfg, requests, folder, table, what=what)

        # Videos of other prompts from earlier runs stay in the table.
        every_video = suite.videos(suite.prompts(), each=100, flickering=100)
        known = [request_of(cfg, video, texts[video.prompt]) for video in every_video]
        keep_earlier(table, known, requests)
        say(f"{len(videos)} videos in {folder}")
        say("next: VBench scores them in its own environment, see docs/vbench.md")


def request_of(cfg: VbenchSampleRun, video: SuiteVideo, text: str) -> SampleRequest:
    """Request a video; its seed does not depend on a rewritten prompt."""
    from common.distributed import derive_seed
    from launch.evaluation.sampling import SampleRequest

    seed = derive_seed(cfg.seed, "vbench", video.prompt, video.index)
    row = {"prompt": video.prompt, "index": video.index, "text": text}
    return SampleRequest(video.name, text, seed, row)
