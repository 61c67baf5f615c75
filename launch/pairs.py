"""Pairs of videos to train on: the generator's own, judged by rewards, or mp4 files that people compared.

    deepspeed --num_accelerators 2 launch/pairs.py --config configs/wan/pairs.yaml prompts=prompts.txt out=data/pairs
    python launch/pairs.py --config configs/wan/pairs.yaml prompts=null table.csv=train.csv out=data/pairs

Writes latents and prompt embeddings as safetensors shards, see `alignment.pair_store`. Ranks share the prompts; started
again, a run goes on where it was and the result has the same bytes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.config import dump
from launch.command import read_command
from launch.schemas.pairs import PairsRun

NOT_IN_A_PAIR = ("out", "keep_candidates")  # settings that change no byte of the set


def main() -> None:
    command = read_command(PairsRun, description=__doc__.splitlines()[0])
    run(command.cfg, resume=command.resume)


def run(cfg: PairsRun, *, resume: str) -> None:
    """The whole set; exit with code 2 when the input is not what it should be, or no pair is left."""
    from common.cli import exit_with_error
    from launch.evaluation.results_table import all_ranks

    with all_ranks():
        try:
            pairs_of_table(cfg, resume) if cfg.table is not None else pairs_of_prompts(
                cfg, resume
            )
        except ValueError as error:
            exit_with_error(str(error))


def identity_of(cfg: PairsRun, *inputs: str | None) -> dict[str, Any]:
    """Everything that decides the set's bytes."""
    from launch.evaluation.results_table import fingerprint

    settings = {
        name: value for name, value in asdict(cfg).items() if name not in NOT_IN_A_PAIR
    }
    return {
        "settings": settings,
        "inputs": {path: fingerprint(path) for path in inputs if path is not None},
    }


def is_made(cfg: PairsRun, identity: dict[str, Any], resume: str) -> bool:
    """True when the set is there and whole. Raises ValueError, on every rank, when it is another one, or when the ranks
    do not share its folder.
    """
    import json

    from alignment.pair_store import MANIFEST, PairSet
    from common import distributed
    from common.log import say
    from common.run_record import differences
    from engine.guard import folder_problem

    if problem := folder_problem(Path(cfg.out)):
        raise ValueError(problem)
    if resume == "none" or not (Path(cfg.out) / MANIFEST).exists():
        distributed.barrier()  # nobody begins to write before all have looked
        return False
    found = PairSet(cfg.out)
    distributed.barrier()
    if changes := differences(
        found.about["identity"], json.loads(json.dumps(identity))
    ):
        told = "; ".join(changes[:4])
        raise ValueError(
            f"{cfg.out} holds other pairs ({told}); name another out, or use --resume none"
        )
    say(f"{cfg.out} is there already: {len(found)} pairs")
    return True


def pairs_of_prompts(cfg: PairsRun, resume: str) -> None:
    """Sample, judge, choose, write."""
    from alignment.prompts import read_prompts

    prompts = read_prompts(cfg.prompts)[: cfg.limit]
    checkpoints = [reward.checkpoint for reward in cfg.rewards.values()]
    identity = identity_of(
        cfg, cfg.prompts, cfg.generator.path, cfg.adapter, *checkpoints
    )
    if is_made(cfg, identity, resume):
        return
    from common import distributed
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_rewards, quiet, trained_generator
    from launch.pair_making import make_pairs

    quiet()
    say(
        f"loading the generator {cfg.generator.path} and the rewards {', '.join(cfg.rewards)}"
    )
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        rewards = build_rewards(cfg.rewards)
    if distributed.is_main():
        dump(cfg, Path(cfg.out))
    make_pairs(
        Path(cfg.out),
        prompts,
        generator,
        rewards,
        {name: reward.weight for name, reward in cfg.rewards.items()},
        how=cfg.pairs,
        seed=cfg.seed,
        per_shard=cfg.per_shard,
        store=cfg.latent_dtype,
        identity=identity,
        resume=resume,
        keep=cfg.keep_candidates,
    )


def pairs_of_table(cfg: PairsRun, resume: str) -> None:
    """Read, decode, encode, write."""
    from rm.benchmarks import read_benchmark
    from rm.video_check import VideoChecker

    source = cfg.table
    table = read_benchmark(
        source.csv, source.layout, dimension=source.dimension, videos=source.videos
    )
    identity = identity_of(cfg, source.csv, cfg.generator.path)
    if is_made(cfg, identity, resume):
        return
    from common import distributed
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_generator, quiet
    from launch.pair_making import candidates_of, conclude, digitise, labelled

    quiet()
    say(table.report())
    decided = [pair for pair in table.pairs if pair.label != 0][: cfg.limit]
    with user_errors():
        generator = build_generator(cfg.generator)
    if distributed.is_main():
        dump(cfg, Path(cfg.out))
    folder = Path(cfg.out)
    with VideoChecker() as checker:
        make = digitise(generator, source.csv, checker)
        rows = candidates_of(folder, decided, make, identity=identity, resume=resume)
    failed = sum("error" in row for row in rows)
    counts = {
        "rows": len(table.pairs) + len(table.problems) + table.invalid,
        "pairs": len(rows) - failed,
    }
    counts |= {
        "ties": sum(pair.label == 0 for pair in table.pairs),
        "invalid": table.invalid,
    }
    counts |= {"bad": len(table.problems), "failed": failed}
    how = {
        "per_shard": cfg.per_shard,
        "latent_dtype": cfg.latent_dtype,
        "identity": identity,
        "keep_candidates": cfg.keep_candidates,
    }
    conclude(folder, labelled(folder, rows), rows, counts, **how)


if __name__ == "__main__":
    main()
