"""Read the pairs of a DPO run, and build its loop."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from alignment.dpo import DpoLoop, backwards_per_update
from alignment.pair_store import PairSet
from alignment.prompts import read_image_prompts
from common import distributed
from common.distributed import DataRanks
from common.log import say
from common.schedule import describe_draws
from generator.conditions import ImageCondition, check_pairs
from generator.context_parallel import check_tokens
from generator.family import Family
from generator.wan_folder import find_wan
from launch.compose import (
    build_generator,
    check_family,
    generator_engine,
    say_long_prompts,
    say_long_texts,
    size_of_training,
)

if TYPE_CHECKING:
    from engine.ema import Ema
    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator
    from launch.schemas.pairs import DpoRun


def read_set(folder: str, cfg: GeneratorConfig) -> PairSet:
    """Read a set of pairs. Raises ValueError if it is incomplete or its videos are unfit.

    Another transformer may learn from them: latents and embeddings depend on the VAE and
    the text encoder only.
    """
    pairs = PairSet(folder)
    # Sets of earlier versions have recorded nothing.
    settings = pairs.about.get("identity", {}).get("settings", {})
    recorded = settings.get("generator", {})
    changes = []
    for name in ("height", "width", "num_frames", "max_sequence_length"):
        wanted = getattr(cfg, name)
        if recorded.get(name, wanted) != wanted:
            changes.append(f"{name} {recorded[name]} -> {wanted}")
    if changes:
        raise ValueError(
            f"{folder} holds other videos than the generator makes: {', '.join(changes)}"
        )
    return pairs


def check_fit(pairs: PairSet, cfg: GeneratorConfig) -> None:
    """Raise ValueError for pairs of texts alone and a model of images, and the other way round."""
    # A generator of another class has its own limits.
    if cfg.target is not None:
        return
    images = pairs.read([0]).images
    condition = None
    if images:
        (tensors,) = images.values()
        condition = ImageCondition.of(tensors)
    prompts = [row.whole_prompt for row in pairs.rows]
    family = Family.of(find_wan(cfg.path))
    try:
        check_pairs(prompts, condition, family, cfg.path)
    except ValueError as error:
        raise ValueError(f"{pairs.folder}: {error}") from error


def check_prompts(run: DpoRun, pairs: PairSet) -> None:
    """Print how many prompts are cut off, of the pairs and of those that are made on the way.

    Raises ValueError for new prompts that the generator does not take. The images of the pairs
    are stored with them, so that their files are not needed.
    """
    texts = list(dict.fromkeys(row.prompt for row in pairs.rows))
    say_long_texts(texts, run.generator)
    if run.refresh is not None:
        say_long_prompts(read_image_prompts(run.refresh.prompts), run.generator)


def shared_pairs(pairs: PairSet, heldout: PairSet) -> set[tuple[str, str]]:
    """Return (prompt, videos) of the pairs that are in both sets."""
    trained = {(row.prompt, row.source) for row in pairs.rows if row.source}
    return trained & {(row.prompt, row.source) for row in heldout.rows}


def build(run: DpoRun, pairs: PairSet) -> DpoLoop:
    """Build generator, engine and loop on this rank.

    Raises ValueError if the ranks cannot share the pairs of a step, or the pairs do not fit
    the method.
    """
    ranks = data_ranks(run)
    accumulation = backwards_per_update(run.dpo, ranks.count)
    check_family(run)
    say(f"loading the generator {run.generator.path}")
    # Without refresh the pairs hold all that VAE and text encoder would compute.
    generator = build_generator(
        run.generator, seed=run.seed, transformer_only=run.refresh is None
    )
    check_tokens(
        pairs.read([0]).chosen_NCFHW.shape[1:],
        generator.patch_size,
        run.generator.context_parallel,
    )
    return loop_of(run, pairs, generator, accumulation=accumulation)


def data_ranks(run: DpoRun) -> DataRanks:
    """Return which ranks hold the same pairs. Raises ValueError if a set of ranks is not whole."""
    together = run.generator.context_parallel
    world = distributed.world_size()
    if world % together:
        raise ValueError(
            f"generator.context_parallel={together} must divide the {world} ranks"
        )
    return DataRanks(together)


def loop_of(
    run: DpoRun, pairs: PairSet, generator: WanGenerator, *, accumulation: int
) -> DpoLoop:
    """Build the loop and the engine around a generator."""
    engine = generator_engine(run, generator, accumulation=accumulation)
    return DpoLoop(
        run.dpo,
        generator=generator,
        engine=engine,
        pairs=pairs,
        seed=run.seed,
        ranks_per_sample=run.generator.context_parallel,
        grad_norm=engine.engine.get_global_grad_norm,
        accepts=generator.trains_at,
    )


def evaluate_average(
    loop: DpoLoop, ema: Ema | None, pairs: PairSet, *, limit: int
) -> dict[str, float]:
    """Evaluate the average of the weights where there is one, else the weights."""
    with nullcontext() if ema is None else ema.swapped_in():
        return loop.evaluate(pairs, limit=limit)


def batch_arithmetic(run: DpoRun, loop: DpoLoop, *, steps: int) -> list[str]:
    """Tell how pairs, ranks and accumulation make one update."""
    per_step = run.dpo.pairs_per_step
    count = len(loop.pairs)
    lines = [
        f"one update = {per_step} pairs, on {distributed.world_size()} ranks "
        f"x {loop.backwards} accumulated backwards of {run.dpo.micro_batch} pairs; "
        f"{count} pairs, {run.dpo.epochs:g} epochs = {steps} updates",
        f"{run.dpo.method}: {size_of_training(run, loop.generator.module)}",
    ]
    uneven = describe_draws(
        count, per_step=per_step, steps=steps, epochs=run.dpo.epochs
    )
    return [*lines, uneven] if uneven else lines
