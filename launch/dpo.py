"""Flow-DPO: fine-tune a Wan generator on pairs of latents that launch/pairs.py wrote; Flow-RWR and SFT alike.

    deepspeed --num_accelerators 2 launch/dpo.py --config configs/wan/dpo.yaml pairs=data/pairs

torchrun and plain python work too. The run folder gets config.yaml, metrics.jsonl, checkpoints/ and final/, the trained
adapter; started again, a run goes on from its newest whole checkpoint. Neither VAE nor text encoder is loaded, unless
``refresh`` makes new pairs on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.schemas.pairs import DpoRun

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from alignment.dpo import DpoLoop
    from alignment.pair_store import PairSet
    from engine.guard import Guard
    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator


def main() -> None:
    command = read_command(DpoRun, description=__doc__.splitlines()[0])
    train(command.cfg, resume=command.resume)


def read_set(folder: str) -> PairSet:
    """A set of pairs; exit with code 2 when it is not whole."""
    from alignment.pair_store import PairSet

    try:
        return PairSet(folder)
    except ValueError as error:
        exit_with_error(str(error))


def misfit(pairs: PairSet, cfg: GeneratorConfig) -> str:
    """How the videos of these pairs are not those of the generator, by what the set says of itself; or nothing. Another
    model may learn from them: latents and embeddings are the VAE's and the text encoder's.
    """
    made = pairs.about.get("identity", {}).get("settings", {}).get("generator", {})
    names = ("height", "width", "num_frames", "max_sequence_length")
    odd = [
        f"{name} {made[name]} -> {now}"
        for name in names
        if (now := getattr(cfg, name)) != made.get(name, now)
    ]
    return (
        f"{pairs.folder} holds other videos than the generator makes: {', '.join(odd)}"
        if odd
        else ""
    )


def train(cfg: DpoRun, *, resume: str) -> None:
    """The whole run, see `go`, under a guard."""
    from launch.compose import quiet

    quiet()
    from engine.guard import guarded

    pairs = read_set(cfg.pairs)
    heldout = None if cfg.heldout is None else read_set(cfg.heldout)
    for found in (pairs, heldout):
        if found is not None and (problem := misfit(found, cfg.generator)):
            exit_with_error(problem)
    with guarded(cfg) as guard:
        go(cfg, pairs, heldout, guard, resume=resume)


def go(
    cfg: DpoRun, pairs: PairSet, heldout: PairSet | None, guard: Guard, *, resume: str
) -> None:
    """Build, go on where the run was, one `DpoLoop.step` after the other, save."""
    from alignment.dpo import steps_of
    from common import faults
    from common.log import RunLog, progress, say
    from engine.ema import Ema
    from engine.export import export
    from engine.state import begin
    from generator.counter import ForwardCounter

    run_dir = Path(cfg.run_dir)
    with user_errors():
        loop, generator, engine = build(cfg, pairs)
    steps = steps_of(cfg.dpo, len(pairs))
    for line in arithmetic(cfg, loop, generator, pairs=len(pairs), steps=steps):
        say(line)
    ema = None if cfg.ema is None else Ema(cfg.ema, generator.module)
    refresher = Refresher(cfg, loop, generator)
    start = begin(
        cfg, engine, resume, also=[Watched(loop), *([] if ema is None else [ema])]
    )
    counter = ForwardCounter(generator.module)
    log = RunLog(
        run_dir, start=start, wandb=cfg.wandb, tensorboard=cfg.tensorboard, total=steps
    )
    warned = False

    guard.begin()
    for step in progress(range(start, steps), steps - start, "dpo"):
        refresher.before(step, first=step == start)
        metrics = timed(loop, step)
        if ema is not None:
            ema.update()
        last = step + 1 == steps
        faults.point("step")
        warned, stop = watch(cfg, loop, step, warned=warned)
        counts = counter.take()
        if heldout is not None and (
            last or stop or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)
        ):
            metrics |= loop.evaluate(heldout, limit=cfg.heldout_pairs)
            counter.take()  # not a step's cost
        skipped = {"train/nonfinite_updates": loop.engine.pop_skipped_count()}
        log.log(step, {**metrics, **skipped, **counts})
        faults.point("logged")
        asked = guard.step_done()
        if last or stop or asked or (step + 1) % cfg.save_every == 0:
            save(cfg, loop, generator, engine, ema, step=step + 1)
        if asked:
            guard.leave(log, step + 1)
        if stop:
            break

    export(generator, ema, run_dir)
    log.close()


def build(cfg: DpoRun, pairs: PairSet) -> tuple[DpoLoop, WanGenerator, DeepSpeedEngine]:
    """Everything a run is made of, on this rank. Raises ValueError when ranks cannot share a step's pairs."""
    from alignment.dpo import backwards_per_update
    from common import distributed
    from common.log import say
    from launch.compose import build_generator

    accumulation = backwards_per_update(cfg.dpo, distributed.world_size())
    say(f"loading the generator {cfg.generator.path}")
    generator = build_generator(
        cfg.generator, seed=cfg.seed, transformer_only=cfg.refresh is None
    )
    loop, engine = loop_of(cfg, pairs, generator, accumulation=accumulation)
    return loop, generator, engine


def loop_of(
    cfg: DpoRun, pairs: PairSet, generator: WanGenerator, *, accumulation: int
) -> tuple[DpoLoop, DeepSpeedEngine]:
    """The loop around a generator that is there; exit with code 2 when the pairs are not for it."""
    from alignment.dpo import DpoLoop
    from engine.deepspeed import build_engine
    from engine.skip_nonfinite import SkipNonFinite

    engine = build_engine(
        generator.module,
        optimizer=cfg.optimizer,
        zero_stage=cfg.zero_stage,
        accumulation=accumulation,
        overrides=cfg.deepspeed,
    )
    generator.sharded = cfg.zero_stage == 3
    try:
        loop = DpoLoop(
            cfg.dpo,
            generator=generator,
            engine=SkipNonFinite(engine, patience=cfg.max_nonfinite_updates),
            pairs=pairs,
            seed=cfg.seed,
            grad_norm=engine.get_global_grad_norm,
        )
    except ValueError as error:
        exit_with_error(str(error))
    return loop, engine


def arithmetic(
    cfg: DpoRun, loop: DpoLoop, generator: WanGenerator, *, pairs: int, steps: int
) -> list[str]:
    """How pairs, ranks and accumulation make one update."""
    from common import distributed
    from engine.zero3 import elements

    ranks, how = distributed.world_size(), cfg.dpo
    trained = elements(p for p in generator.module.parameters() if p.requires_grad)
    return [
        f"one update = {how.pairs_per_step} pairs, on {ranks} rank{'s' * (ranks > 1)} x {loop.backwards} accumulated "
        f"backwards of {how.micro_batch} pairs; {pairs} pairs, {how.epochs:g} epochs = {steps} updates",
        f"{how.method}: training {trained:,} of {elements(generator.module.parameters()):,} parameters, "
        f"ZeRO {cfg.zero_stage}",
    ]


def timed(loop: DpoLoop, step: int) -> dict[str, float]:
    """One step's metrics, with its seconds and the most memory any rank has held."""
    import time

    from common.distributed import mean_over_ranks
    from common.memory import peak_memory

    start = time.perf_counter()
    metrics = loop.step(step)
    memory = peak_memory()
    return {
        **metrics,
        **mean_over_ranks({"seconds/step": time.perf_counter() - start}),
        **memory,
    }


def watch(cfg: DpoRun, loop: DpoLoop, step: int, *, warned: bool) -> tuple[bool, bool]:
    """(warned, stop): say once that the policy runs from the loser, and whether to stop for it."""
    from common.log import say

    if not loop.rising():
        return warned, False
    if not warned or cfg.dpo.stop_on_displacement:
        say(
            f"step {step}: over {cfg.dpo.displacement_window} steps the winner's error has risen above the reference's: the policy "
            "runs from the loser, not to the winner. A larger dpo.beta, a smaller optimizer.lr or dpo.sft_weight helps"
        )
    return True, cfg.dpo.stop_on_displacement


class Watched:
    """What `DpoLoop.rising` remembers, in the checkpoint."""

    def __init__(self, loop: DpoLoop) -> None:
        self.loop = loop

    def load(self, folder: Path) -> None:
        from common.checkpoint import load_state

        self.loop.watched.clear()
        self.loop.watched.extend(
            float("nan") if value is None else value
            for value in load_state(folder)["watched"]
        )


class Refresher:
    """Online pairs: before step n every, the policy makes a set of its own in run_dir/pairs/round-n."""

    def __init__(self, cfg: DpoRun, loop: DpoLoop, generator: WanGenerator) -> None:
        self.cfg, self.loop, self.generator = cfg, loop, generator
        self.rewards = None
        if cfg.refresh is not None:
            from launch.compose import build_rewards

            self.rewards = build_rewards(cfg.refresh.rewards)

    def before(self, step: int, *, first: bool) -> None:
        """All ranks call it before every step; ``first`` after a start, when the current round must be found again."""
        from alignment.pair_store import MANIFEST, PairSet

        how = self.cfg.refresh
        if how is None or step < how.every:
            return
        turn = step // how.every
        folder = Path(self.cfg.run_dir) / "pairs" / f"round-{turn:04d}"
        if step % how.every == 0:
            self.make(folder, turn)
        elif first:
            whole = [
                one
                for one in sorted(folder.parent.glob("round-*"))
                if one <= folder and (one / MANIFEST).exists()
            ]
            if whole:
                self.loop.use(PairSet(whole[-1]))

    def make(self, folder: Path, turn: int) -> None:
        from alignment.pair_store import PairSet
        from alignment.prompts import read_prompts
        from common.distributed import derive_seed
        from common.schedule import IndexSchedule
        from launch.pair_making import make_pairs

        how = self.cfg.refresh
        prompts = read_prompts(how.prompts)
        drawn = IndexSchedule(
            len(prompts), seed=self.cfg.seed, per_step=how.limit, name="refresh"
        ).at(turn - 1)
        try:
            make_pairs(
                folder,
                [prompts[i] for i in drawn],
                self.generator,
                self.rewards,
                {name: reward.weight for name, reward in how.rewards.items()},
                how=how.pairs,
                seed=derive_seed(self.cfg.seed, "refresh", turn),
                per_shard=64,
                store="float32",
                identity={"round": turn},
                resume="none",
            )
            self.loop.use(PairSet(folder))
        except ValueError as error:
            from common.log import say

            say(
                f"round {turn} of online pairs is left out, the ones before stay: {error}"
            )


def save(
    cfg: DpoRun,
    loop: DpoLoop,
    generator: WanGenerator,
    engine: DeepSpeedEngine,
    ema: object,
    *,
    step: int,
) -> None:
    """checkpoints/step-N as launch/grpo.py writes them, with what is watched. All ranks call it."""
    from common.types import json_number
    from engine.export import save as save_run

    watched = [json_number(value) for value in loop.watched]
    save_run(cfg, generator, engine, ema, step=step, state={"watched": watched})


if __name__ == "__main__":
    main()
