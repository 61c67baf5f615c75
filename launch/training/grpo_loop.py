"""Build the loop of a GRPO run, and encode its prompts in advance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignment.grpo import GrpoLoop, backwards_per_update
from alignment.prompts import PromptSchedule
from common import distributed
from common.log import say
from common.types import Prompt, text_of
from engine.old_policy import OldPolicy
from generator.schedule import solver_grid
from launch.compose import (
    build_generator,
    build_rewards,
    check_family,
    generator_engine,
)

if TYPE_CHECKING:
    from common.types import RewardModel
    from generator.wan import WanGenerator
    from launch.schemas.training import GrpoRun


def build(run: GrpoRun, prompts: list[Prompt]) -> GrpoLoop:
    """Build rewards, generator, engine and loop on this rank."""
    names = ", ".join(run.rewards)
    say(f"loading the rewards {names} and the generator {run.generator.source}")
    # Rewards first: a missing reward server is noticed before weights are loaded.
    check_family(run, stochastic=True, objective=run.grpo.objective)
    rewards = build_rewards(run.rewards)
    generator = build_generator(run.generator, seed=run.seed)
    return loop_of(run, prompts, generator, rewards)


def loop_of(
    run: GrpoRun,
    prompts: list[Prompt],
    generator: WanGenerator,
    rewards: dict[str, RewardModel],
) -> GrpoLoop:
    """Build the loop and the engine around a generator and rewards."""
    # The engine steps the optimizer after as many backwards as the loop makes.
    together = run.generator.context_parallel
    accumulation = backwards_per_update(
        run.grpo,
        run.prompts_per_step,
        ranks=distributed.DataRanks(together).count,
        steps_per_group=run.generator.sampler.steps_per_group,
    )
    engine = generator_engine(run, generator, accumulation=accumulation)
    # Of the weights that the engine has given to every rank.
    old = None
    if run.grpo.has_old_policy:
        old = OldPolicy(run.grpo.forward.old_policy.decay, generator.module)
    return GrpoLoop(
        run.grpo,
        generator=generator,
        rewards=rewards,
        weights={name: reward.weight for name, reward in run.rewards.items()},
        engine=engine,
        prompts=PromptSchedule(
            prompts, seed=run.seed, prompts_per_step=run.prompts_per_step
        ),
        fps=run.generator.fps,
        ranks_per_sample=together,
        levels=levels_of(run),
        old=old,
        grad_norm=engine.engine.get_global_grad_norm,
    )


def levels_of(run: GrpoRun) -> list[float]:
    """Return the noise levels that a forward objective trains: of the rollout's own grid."""
    sampler = run.generator.sampler
    grid = solver_grid(sampler)
    # the final 0 is no level: there the video is its own input
    return [grid[i] for i in run.grpo.forward.trained_places(sampler.solver_steps)]


def cache_prompts(
    run: GrpoRun, loop: GrpoLoop, heldout: list[Prompt], start: int
) -> None:
    """Encode this rank's prompts of all steps from ``start`` on, and free the text encoder."""
    # This rank's share of every step, by the same schedule that the loop uses.
    prompts: set[Prompt] = set()
    for step in range(start, run.steps):
        prompts.update(loop.batch(step).prompts)
    say(f"encoding {len(prompts)} prompts, then without the text encoder")
    # Sorted, so that the batches of the text encoder do not depend on the set's order.
    loop.generator.encode_prompts([*sorted(prompts, key=text_of), *heldout])
    loop.generator.free_text_encoder()
