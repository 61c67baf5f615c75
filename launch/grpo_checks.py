"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.cli import exit_with_error
from launch.schemas.training import GrpoRun

if TYPE_CHECKING:
    from alignment.grpo import GrpoLoop


def check_ranks(cfg: GrpoRun, *, ranks: int) -> None:
    """Exit with code 2, before anything is loaded, when the ranks cannot share a step's groups evenly."""
    shared = cfg.grpo.ranks_per_group
    if ranks % shared:
        exit_with_error(f"grpo.ranks_per_group={shared} must divide the {ranks} ranks")
    sets = ranks // shared
    if cfg.prompts_per_step % sets:
        share = f"{cfg.prompts_per_step} / {sets} = {cfg.prompts_per_step / sets:.2f} groups each"
        who = "ranks, which" if shared == 1 else f"sets of {shared} ranks, whose number"
        exit_with_error(f"prompts_per_step is over all {who} must divide it: {share}")


def show_cause(error: Exception) -> None:
    """What a reward's own code raised, with its traceback, on the rank where it did."""
    import traceback

    from common.types import RewardUnavailableError

    if not isinstance(
        error.__cause__, RewardUnavailableError | None
    ):  # a server that is away has said all
        traceback.print_exception(error.__cause__)


def run_self_checks(cfg: GrpoRun, loop: GrpoLoop, prompts: list[str]) -> None:
    """`alignment.self_checks`, all ranks the same; exit with code 2 at what would spoil the run."""
    import torch

    from alignment import self_checks
    from common.distributed import derive_seed, raise_on_all
    from common.log import say
    from common.types import RewardUnavailableError
    from generator.stock_check import stock_gap

    generator, own = loop.generator, prompts[:4]
    dtype = cfg.generator.dtype
    findings = [
        self_checks.same_weights(generator.module),
        self_checks.stock_trajectory(lambda: stock_gap(generator, own[0]), dtype=dtype),
        self_checks.first_ratio(
            generator, own[0], dtype=dtype, fatal=cfg.generator.guidance_in_update
        ),
    ]
    if len(own) > 1:
        seeds = [derive_seed(cfg.seed, "self-check", i) for i in range(len(own))]
        video_BTYXC = torch.cat(
            [
                generator.decode(generator.sample([p], [s]))
                for p, s in zip(own, seeds, strict=True)
            ]
        )
        rewards = [one for one in loop.rewards.values() if not one.group_level]
        problem = None
        try:
            for reward in rewards:
                findings += [
                    check(reward, video_BTYXC, own, fps=loop.fps)
                    for check in (self_checks.permutation, self_checks.sense)
                ]
        except RewardUnavailableError as error:
            if not isinstance(
                error.__cause__, ValueError
            ):  # which says enough: of these videos, or their number
                show_cause(error)
            problem = error
        try:
            raise_on_all(problem)
        except RewardUnavailableError as error:
            exit_with_error(str(error))
    for finding in findings:
        say(
            f"self-check {'ok' if finding.ok else 'FAILED' if finding.fatal else 'WARNING'}: {finding.message}"
        )
    if failed := [
        finding.name for finding in findings if finding.fatal and not finding.ok
    ]:
        exit_with_error(
            f"self-checks failed: {', '.join(failed)}; self_checks=false trains all the same"
        )


def batch_arithmetic(cfg: GrpoRun, *, ranks: int, module: Any) -> list[str]:
    """How prompts, members, ranks and accumulation make one update; what most runs of this kind get wrong."""
    from alignment.grpo import backwards_per_update
    from engine.zero3 import elements

    shared, steps = cfg.grpo.ranks_per_group, cfg.generator.sampler.steps_per_group
    groups = cfg.prompts_per_step * shared // ranks
    together = f", {shared} ranks to a group" if shared > 1 else ""
    trained = elements(p for p in module.parameters() if p.requires_grad)
    everything = elements(module.parameters())
    videos = cfg.prompts_per_step * cfg.grpo.group_size
    backwards = backwards_per_update(
        cfg.grpo, cfg.prompts_per_step, ranks=ranks, steps_per_group=steps
    )
    return [
        f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} members = {videos} videos, on {ranks} "
        f"rank{'s' * (ranks > 1)} x {groups} groups{together}, {backwards} accumulated backwards each",
        f"training {trained:,} of {everything:,} parameters, ZeRO {cfg.zero_stage}, {cfg.steps} updates",
        *(
            ["fewer than 32 videos per update: expect a noisy reward curve"]
            if videos < 32
            else []
        ),
    ]
