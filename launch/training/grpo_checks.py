"""Checks before a GRPO run trains: shares of the ranks, self-checks, and the batch's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.cli import exit_with_error
from common.types import Prompt, text_of
from launch.training.start_checks import context_findings, report

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from alignment.grpo import GrpoLoop
    from alignment.rewards.errors import NamedReward
    from alignment.self_checks import Finding
    from launch.schemas.training import GrpoRun

FEW_VIDEOS = 32
# Videos for the checks of rewards: at least 4, and more where the seconds suffice for them.
CHECKED_VIDEOS = 4
MOST_CHECKED_VIDEOS = 16
# Groups that are decoded in two ways, where rewards have a decoder of their own.
CHECKED_GROUPS = 2
CHECK_SECONDS = 10.0


def check_ranks(run: GrpoRun, *, ranks: int) -> None:
    """Exit with code 2, before anything is loaded, if the ranks cannot share the groups."""
    # Ranks that compute each sample together count as one.
    together = run.generator.context_parallel
    check_context_ranks(together, ranks=ranks)
    sets = ranks // together

    # Sets of ranks share groups.
    per_group = run.grpo.ranks_per_group
    if sets % per_group:
        of_ranks = f"sets of {together} ranks" if together > 1 else "ranks"
        exit_with_error(
            f"grpo.ranks_per_group={per_group} must divide the {sets} {of_ranks}"
        )
    # Every set has the same number of groups.
    blocks = sets // per_group
    if run.prompts_per_step % blocks:
        groups = run.prompts_per_step / blocks
        who = "ranks, which"
        if per_group * together > 1:
            who = f"sets of {per_group * together} ranks, whose number"
        exit_with_error(
            f"prompts_per_step is over all {who} must divide it: "
            f"{run.prompts_per_step} / {blocks} = {groups:.2f} groups each"
        )


def check_context_ranks(together: int, *, ranks: int) -> None:
    """Exit with code 2 if sets of so many ranks, which share tokens, are not whole."""
    if ranks % together:
        exit_with_error(
            f"generator.context_parallel={together} must divide the {ranks} ranks"
        )


def print_cause(error: Exception) -> None:
    """Print the traceback of an exception in a reward's code, on the rank where it happened."""
    import traceback

    from common.types import RewardUnavailableError

    # A RewardUnavailableError has no cause or, for a missing server, a message that suffices.
    cause = error.__cause__
    if cause is not None and not isinstance(cause, RewardUnavailableError):
        traceback.print_exception(cause)


def run_self_checks(run: GrpoRun, loop: GrpoLoop, prompts: list[Prompt]) -> None:
    """Run `alignment.self_checks` on all ranks; exit with code 2 if one fails that must not."""
    from common.log import say

    # At full size they take minutes, before there is a progress bar.
    say("self-checks: sampling a video two ways and a group twice")
    report(
        [*_generator_findings(run, loop, prompts[0]), *_all_rewards(run, loop, prompts)]
    )


def changed_rewards(folder: Path, run: GrpoRun) -> list[str]:
    """Name the settings of rewards that are other ones than a checkpoint's: ``a.b: 1 -> 2``.

    A weight changes no reward. Checkpoints without settings count as unchanged.
    """
    from common.run_record import SETTINGS, changed_settings

    if not (folder / SETTINGS).is_file():
        return []
    return [
        change
        for change in changed_settings(folder / SETTINGS, run)
        if change.startswith("rewards.") and ".weight:" not in change
    ]


def check_rewards(run: GrpoRun, loop: GrpoLoop, prompts: list[Prompt]) -> None:
    """Run the checks of rewards alone, as `run_self_checks` does."""
    report(_all_rewards(run, loop, prompts))


def _all_rewards(run: GrpoRun, loop: GrpoLoop, prompts: list[Prompt]) -> list[Finding]:
    from common.log import say

    # A wrong prompt must be another one.
    different = list({text_of(prompt): prompt for prompt in prompts}.values())
    if len(different) == 1:
        return []
    say(
        f"self-checks: scoring {CHECKED_VIDEOS} or more sampled videos by every reward; "
        "self_checks=false leaves them out"
    )
    return _reward_findings(run, loop, different[:MOST_CHECKED_VIDEOS])


def _generator_findings(run: GrpoRun, loop: GrpoLoop, prompt: Prompt) -> list[Finding]:
    from alignment import self_checks
    from generator.stock_check import stock_gap

    generator = loop.generator
    dtype = run.generator.dtype
    # The first group of the run's first step, which costs a small part of that step.
    batch = loop.batch(0)
    findings = [
        *context_findings(generator),
        self_checks.same_weights(generator.module),
    ]
    # Only Wan has a stock pipeline to compare with.
    if run.generator.target is None:
        gap = self_checks.stock_trajectory(
            lambda: stock_gap(generator, prompt), dtype=dtype
        )
        findings.append(gap)
    # Without a stochastic step there is no log-prob to compare.
    if run.grpo.objective != "policy":
        return findings
    return [
        *findings,
        self_checks.first_ratio(
            generator,
            batch.prompts[0],
            dtype=dtype,
            fatal=run.generator.guidance_in_update,
            group_size=loop.ranks.members,
            seed=batch.seeds[0],
            on_policy=run.grpo.updates == 1,
        ),
    ]


def sample_to_check(run: GrpoRun, loop: GrpoLoop, prompts: list[Prompt]) -> Tensor:
    """Sample a video of each of the first prompts, more of them where that is quick.

    The number is the same on every rank: sharded weights need equally many forwards.
    """
    import time

    import torch

    from common.distributed import derive_seed, max_over_ranks

    # One video at a time, so that the checks need no more memory than a rollout.
    videos = []
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        seconds = max_over_ranks(time.perf_counter() - start)
        if i >= CHECKED_VIDEOS and seconds > CHECK_SECONDS:
            break
        seed = derive_seed(run.seed, "self-check", i)
        latent = loop.generator.sample([prompt], [seed])
        videos.append(loop.decode_to_score(latent))
    return torch.cat(videos)


def decoded_both_ways(loop: GrpoLoop) -> tuple[Tensor, Tensor, list[str]]:
    """Roll out the first groups of the run, a few, and decode them for rewards and by the VAE.

    Returns both versions of the videos, group-major, and their prompts.
    """
    import torch

    # Every rank has as many prompts in a step.
    batch = loop.batch(0)
    groups = loop.generator.rollout(
        batch.prompts[:CHECKED_GROUPS],
        group_size=loop.ranks.members,
        seeds=batch.seeds[:CHECKED_GROUPS],
    )
    clean = torch.cat([group.clean_GCFHW for group in groups])
    texts = [text_of(group.prompt) for group in groups for _ in range(group.size)]
    return loop.decode_to_score(clean), loop.generator.decode(clean), texts


def _reward_findings(
    run: GrpoRun, loop: GrpoLoop, prompts: list[Prompt]
) -> list[Finding]:
    """Check every reward that scores videos one by one on videos of these prompts.

    Exits with code 2 on all ranks if a reward cannot score on one of them.
    """
    from alignment.self_checks import decoders_agree
    from common.distributed import raise_on_all
    from common.types import RewardUnavailableError

    video_BTYXC = sample_to_check(run, loop, prompts)
    both = decoded_both_ways(loop) if loop.has_scoring_decoder else None
    prompts = [text_of(prompt) for prompt in prompts[: len(video_BTYXC)]]

    # Group-level rewards compare the members of a group, which these videos are not.
    findings = []
    problem = None
    try:
        for reward in loop.rewards.values():
            if not reward.group_level:
                findings += _findings_of(reward, video_BTYXC, prompts, fps=loop.fps)
            if not reward.group_level and both is not None:
                agreed = decoders_agree(
                    reward, *both, fps=loop.fps, members=loop.ranks.members
                )
                findings.append(agreed)
    except RewardUnavailableError as error:
        # The message of a ValueError suffices: it is about these videos or their number.
        if not isinstance(error.__cause__, ValueError):
            print_cause(error)
        problem = error
    try:
        raise_on_all(problem)
    except RewardUnavailableError as error:
        exit_with_error(str(error))
    return findings


def _findings_of(
    reward: NamedReward, video_BTYXC: Tensor, prompts: list[str], *, fps: float
) -> list[Finding]:
    """Check a reward on the first videos, and on more where it scores them quickly."""
    import time

    from alignment.self_checks import permutation, sense

    # The order of a batch shows with few videos; it scores each of them twice.
    few = slice(CHECKED_VIDEOS)
    start = time.perf_counter()
    order = permutation(reward, video_BTYXC[few], prompts[few], fps=fps)
    seconds = (time.perf_counter() - start) / (2 * CHECKED_VIDEOS)
    # Whether it makes sense shows better with more; it scores each of them four times.
    part = slice(affordable_videos(4 * seconds))
    return [order, sense(reward, video_BTYXC[part], prompts[part], fps=fps)]


def affordable_videos(seconds_each: float) -> int:
    """How many videos `CHECK_SECONDS` suffice for, within the limits."""
    if seconds_each * MOST_CHECKED_VIDEOS <= CHECK_SECONDS:
        return MOST_CHECKED_VIDEOS
    return max(CHECKED_VIDEOS, int(CHECK_SECONDS / seconds_each))


def batch_arithmetic(run: GrpoRun, loop: GrpoLoop) -> list[str]:
    """Tell how prompts, members, ranks and accumulation make one update."""
    from alignment.grpo import backwards_per_update
    from common.distributed import world_size
    from launch.compose import size_of_training

    # One update over all ranks.
    group_size = run.grpo.group_size
    per_group = run.grpo.ranks_per_group
    videos = run.prompts_per_step * group_size
    groups = run.prompts_per_step // loop.ranks.shards
    backwards = backwards_per_update(
        run.grpo,
        run.prompts_per_step,
        ranks=loop.ranks.shards * per_group,
        steps_per_group=run.generator.sampler.steps_per_group,
    )
    shared = f", {per_group} ranks to a group" if per_group > 1 else ""
    if loop.ranks.ranks_per_sample > 1:
        shared += f", {loop.ranks.ranks_per_sample} ranks to a sample"
    lines = [
        f"one update = {run.prompts_per_step} prompts x {group_size} members = {videos} "
        f"videos, on {world_size()} ranks x {groups} groups{shared}, {backwards} accumulated "
        "backwards each",
        f"{size_of_training(run, loop.generator.module)}, {run.steps} updates",
    ]
    if videos < FEW_VIDEOS:
        lines.append(
            f"fewer than {FEW_VIDEOS} videos per update: expect a noisy reward curve"
        )
    return lines
