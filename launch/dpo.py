"""Flow-DPO, Flow-RWR or fine-tuning of a Wan generator on pairs of latents.

    deepspeed --num_accelerators 2 launch/dpo.py --config configs/wan/dpo.yaml pairs=data/pairs

launch/pairs.py writes the pairs. torchrun and plain python work too. The run folder gets
config.yaml, metrics.jsonl, checkpoints/ and final/, the trained adapter. Started again, a run
resumes from its newest whole checkpoint. Neither VAE nor text encoder is loaded, unless
``refresh`` makes new pairs on the way.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.schemas.pairs import DpoRun
from launch.training.inputs import with_inputs

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.dpo import DpoLoop
    from alignment.pair_store import PairSet
    from engine.trainer import TrainingTask
    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator


def main() -> None:
    command = read_command(DpoRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def train(run: DpoRun, *, resume: str) -> None:
    """Read the pairs, build everything and train."""
    from launch.compose import quiet, say_long_prompts

    quiet()
    from common.log import say
    from engine.trainer import run_training

    # Read the input first: a mistake in it ends the process within seconds.
    pairs = read_set(run.pairs, run.generator)
    heldout = None if run.heldout is None else read_set(run.heldout, run.generator)
    with user_errors():
        say_long_prompts(prompts_of(run, pairs), run.generator)
    shared = 0 if heldout is None else len(shared_pairs(pairs, heldout))
    if shared:
        say(f"{shared} of {len(heldout)} held-out pairs are trained on as well")
    build_recorded = with_inputs(run, lambda: build_task(run, pairs, heldout))
    run_training(run, build_recorded, resume=resume)


def prompts_of(run: DpoRun, pairs: PairSet) -> list[str]:
    """Return the prompts of the pairs, and those that the policy will make new pairs of."""
    from alignment.prompts import read_prompts

    prompts = list(dict.fromkeys(row.prompt for row in pairs.rows))
    if run.refresh is not None:
        prompts += read_prompts(run.refresh.prompts)
    return prompts


def shared_pairs(pairs: PairSet, heldout: PairSet) -> set[tuple[str, str]]:
    """Return (prompt, videos) of the pairs that are in both sets."""
    trained = {(row.prompt, row.source) for row in pairs.rows if row.source}
    return trained & {(row.prompt, row.source) for row in heldout.rows}


def read_set(folder: str, generator: GeneratorConfig) -> PairSet:
    """Read a set of pairs; exit with code 2 if it is incomplete or of another size."""
    from alignment.pair_store import PairSet

    try:
        pairs = PairSet(folder)
    except ValueError as error:
        exit_with_error(str(error))
    problem = misfit(pairs, generator)
    if problem:
        exit_with_error(problem)
    return pairs


def misfit(pairs: PairSet, cfg: GeneratorConfig) -> str:
    """Describe how the videos of these pairs differ from the generator's, or return "".

    Another transformer may learn from them: latents and embeddings depend on the VAE and
    the text encoder only.
    """
    # Sets of earlier versions have recorded nothing.
    settings = pairs.about.get("identity", {}).get("settings", {})
    recorded = settings.get("generator", {})
    changes = []
    for name in ("height", "width", "num_frames", "max_sequence_length"):
        wanted = getattr(cfg, name)
        if recorded.get(name, wanted) != wanted:
            changes.append(f"{name} {recorded[name]} -> {wanted}")
    if not changes:
        return ""
    return f"{pairs.folder} holds other videos than the generator makes: {', '.join(changes)}"


def build_task(run: DpoRun, pairs: PairSet, heldout: PairSet | None) -> TrainingTask:
    """Build everything and describe the run to the training loop."""
    from alignment.dpo import steps_of
    from common.log import say
    from engine.ema import Ema
    from engine.trainer import StepReport, no_metrics
    from launch.compose import generator_task
    from launch.training.dpo_displacement import DisplacementWatch
    from launch.training.dpo_refresh import Refresher

    # Build, and tell how large an update is.
    with user_errors():
        loop, generator, _ = build(run, pairs)
    steps = steps_of(run.dpo, len(pairs))
    for line in batch_arithmetic(run, loop, pairs=len(pairs), steps=steps):
        say(line)
    ema = None if run.ema is None else Ema(run.ema, generator.module)
    watch = DisplacementWatch(loop, stops=run.dpo.stop_on_displacement)
    refresher = None if run.refresh is None else Refresher(run, loop, generator)

    # The parts that only DPO has.
    def step(number: int) -> StepReport:
        if refresher is not None:
            refresher.before(number)
        metrics = timed_step(loop, number)
        return StepReport(metrics, stop=watch.should_stop(number))

    def evaluate() -> dict[str, float]:
        return loop.evaluate(heldout, limit=run.heldout_pairs)

    return generator_task(
        run,
        generator,
        ema,
        label="dpo",
        steps=steps,
        engine=loop.engine,
        step=step,
        measure_after=no_metrics if heldout is None else evaluate,
        measure_every=run.eval_every,
        state=watch.state,
        restore=watch.restore,
    )


def build(run: DpoRun, pairs: PairSet) -> tuple[DpoLoop, WanGenerator, DeepSpeedEngine]:
    """Build the loop, the generator and the engine on this rank.

    Raises ValueError if the ranks cannot share the pairs of a step.
    """
    from alignment.dpo import backwards_per_update
    from common import distributed
    from common.log import say
    from launch.compose import build_generator

    accumulation = backwards_per_update(run.dpo, distributed.world_size())
    say(f"loading the generator {run.generator.path}")
    # Without refresh the pairs hold all that VAE and text encoder would compute.
    generator = build_generator(
        run.generator, seed=run.seed, transformer_only=run.refresh is None
    )
    loop, engine = loop_of(run, pairs, generator, accumulation=accumulation)
    return loop, generator, engine


def loop_of(
    run: DpoRun, pairs: PairSet, generator: WanGenerator, *, accumulation: int
) -> tuple[DpoLoop, DeepSpeedEngine]:
    """Build the loop and the engine around a generator.

    Raises ValueError if the pairs do not fit the method.
    """
    from alignment.dpo import DpoLoop
    from launch.compose import generator_engine

    engine = generator_engine(run, generator, accumulation=accumulation)
    loop = DpoLoop(
        run.dpo,
        generator=generator,
        engine=engine,
        pairs=pairs,
        seed=run.seed,
        grad_norm=engine.engine.get_global_grad_norm,
    )
    return loop, engine.engine


def batch_arithmetic(
    run: DpoRun, loop: DpoLoop, *, pairs: int, steps: int
) -> list[str]:
    """Tell how pairs, ranks and accumulation make one update."""
    from common import distributed
    from common.schedule import describe_draws
    from engine.zero3 import elements

    parameters = list(loop.generator.module.parameters())
    trained = elements(p for p in parameters if p.requires_grad)
    per_step = run.dpo.pairs_per_step
    uneven = describe_draws(
        pairs, per_step=per_step, steps=steps, epochs=run.dpo.epochs
    )
    return [
        f"one update = {per_step} pairs, on {distributed.world_size()} ranks "
        f"x {loop.backwards} accumulated backwards of {run.dpo.micro_batch} pairs; "
        f"{pairs} pairs, {run.dpo.epochs:g} epochs = {steps} updates",
        f"{run.dpo.method}: training {trained:,} of {elements(parameters):,} parameters, "
        f"ZeRO {run.zero_stage}",
        *([uneven] if uneven else []),
    ]


def timed_step(loop: DpoLoop, step: int) -> dict[str, float]:
    """Make one optimizer step; its metrics and its seconds, MEAN over ranks."""
    from common.distributed import mean_over_ranks

    start = time.perf_counter()
    metrics = loop.step(step)
    seconds = mean_over_ranks({"seconds/step": time.perf_counter() - start})
    return {**metrics, **seconds}


if __name__ == "__main__":
    main()
