"""Make pairs of videos for DPO: sampled and scored by rewards, or files that people compared.

    deepspeed --num_accelerators 2 launch/pairs.py --config configs/wan/pairs.yaml \\
        prompts=prompts.txt out=data/pairs
    python launch/pairs.py --config configs/wan/pairs.yaml \\
        prompts=null table.csv=train.csv out=data/pairs

Writes latents and prompt embeddings as safetensors shards, see `alignment.pair_store`. Ranks
share the prompts. A restarted run continues where it was, and the result has the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import dump
from launch.command import run_command
from launch.next_recipe import next_recipe
from launch.schemas.pairs import PairsRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.training.pair_making import PairOutput

# Settings that change no byte of the set.
NOT_IN_A_PAIR = ("out", "keep_candidates")


def main() -> None:
    run_command(
        PairsRun,
        lambda command: run(command.cfg, resume=command.resume),
        description=__doc__,
    )


def run(cfg: PairsRun, *, resume: str) -> None:
    """Make the set. Exit with code 2 when the input is wrong or no pair is left."""
    from launch.compose import quiet

    quiet()
    from common.cli import exit_with_error
    from common.log import say
    from launch.evaluation.results_table import all_ranks

    # prompts are sampled; a table names files that people compared
    make = pairs_of_prompts if cfg.table is None else pairs_of_table
    with all_ranks(folder=cfg.out):
        try:
            make(cfg, resume)
        except ValueError as error:
            exit_with_error(str(error))
        recipe = next_recipe("dpo")
        say(f"next: deepspeed launch/dpo.py --config {recipe} pairs={cfg.out}")


def pairs_of_prompts(cfg: PairsRun, resume: str) -> None:
    """Sample candidates of every prompt, score them, choose pairs, and write the set."""
    from alignment.prompts import image_files, read_image_prompts
    from generator.conditions import check_alike

    # stop here when the set is complete
    prompts = read_image_prompts(cfg.prompts)[: cfg.limit]
    check_alike(prompts)
    inputs = [cfg.prompts, cfg.generator.path, cfg.adapter]
    inputs += image_files(prompts).values()
    for reward in cfg.rewards.values():
        inputs += reward.files
    output = start_output(cfg, resume, inputs)
    if output is None:
        return

    # load the generator and the rewards
    from alignment.rewards import check_group_size
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_rewards, say_long_prompts, trained_generator
    from launch.training.pair_making import make_pairs

    with user_errors():
        say_long_prompts(prompts, cfg.generator)
    names = ", ".join(cfg.rewards)
    say(f"loading the generator {cfg.generator.path} and the rewards {names}")
    with user_errors():
        generator = trained_generator(cfg.generator, cfg.adapter)
        rewards = build_rewards(cfg.rewards)
        # all candidates of a prompt are compared
        check_group_size(rewards, cfg.pairs.candidates)

    # sample, score, choose, write
    make_pairs(
        output,
        prompts,
        generator,
        rewards,
        {name: reward.weight for name, reward in cfg.rewards.items()},
        how=cfg.pairs,
        seed=cfg.seed,
    )


def pairs_of_table(cfg: PairsRun, resume: str) -> None:
    """Read a table of compared files, encode the decided pairs, and write the set."""
    from rm.benchmarks import read_benchmark
    from rm.video_check import VideoChecker

    # stop here when the set is complete
    source = cfg.table
    table = read_benchmark(
        source.csv,
        source.layout,
        dimension=source.dimension,
        videos=source.videos,
        columns=source.columns,
    )
    output = start_output(cfg, resume, [source.csv, cfg.generator.path])
    if output is None:
        return

    # load the generator, whose VAE encodes
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_generator, say_long_prompts
    from launch.training.pair_making import (
        encode_pair,
        labelled,
        make_candidates,
        write_output,
    )

    say(table.report())
    decided = [pair for pair in table.pairs if pair.label != 0]
    with user_errors():
        # a model that needs images refuses these texts
        prompts = list(dict.fromkeys(pair.prompt for pair in decided))
        say_long_prompts(prompts, cfg.generator)
        generator = build_generator(cfg.generator)

    # encode both videos of every decided pair
    with VideoChecker() as checker:
        make = encode_pair(generator, source.csv, checker)
        rows = make_candidates(output, decided[: cfg.limit], make)

    # write the set
    failed = sum("error" in row for row in rows)
    counts = {
        "rows": len(table.pairs) + len(table.problems) + table.invalid,
        "pairs": len(rows) - failed,
        "ties": len(table.pairs) - len(decided),
        "invalid": table.invalid,
        "bad": len(table.problems),
        "failed": failed,
    }
    write_output(output, labelled(output.folder, rows), rows, counts)


def start_output(
    cfg: PairsRun, resume: str, inputs: Sequence[str | None]
) -> PairOutput | None:
    """Describe the set to write, and save the config beside it. None if the set is complete.

    ``inputs`` are the files and folders that the set is made from.
    """
    from common import distributed
    from launch.evaluation.results_table import fingerprint
    from launch.training.pair_making import PairOutput

    # everything that decides the set's bytes; where it is written does not
    folder = Path(cfg.out)
    settings = asdict(cfg)
    for name in NOT_IN_A_PAIR:
        settings.pop(name)
    fingerprints = {path: fingerprint(path) for path in inputs if path is not None}
    identity = {"settings": settings, "inputs": fingerprints}
    if is_complete(folder, identity, resume):
        return None
    if distributed.is_main():
        dump(cfg, folder)
    return PairOutput(
        folder,
        identity,
        resume,
        per_shard=cfg.per_shard,
        store=cfg.latent_dtype,
        keep=cfg.keep_candidates,
    )


def is_complete(folder: Path, identity: dict[str, Any], resume: str) -> bool:
    """Return True when the set in ``folder`` is complete and has this identity.

    All ranks must call this. Raises ValueError, on every rank, when the set has another
    identity, or when the ranks do not share its folder.
    """
    from alignment.pair_store import MANIFEST, PairSet
    from common import distributed
    from common.log import say
    from common.run_record import differences
    from engine.guard import folder_problem

    # ranks on several nodes must see the same folder
    problem = folder_problem(folder)
    if problem:
        raise ValueError(problem)
    if resume == "none" or not (folder / MANIFEST).exists():
        distributed.barrier()  # no rank begins to write before all have looked
        return False

    # a complete set: it must be the same
    pairs = PairSet(folder)
    distributed.barrier()
    wanted = json.loads(json.dumps(identity))
    changes = differences(pairs.about["identity"], wanted)
    if changes:
        raise ValueError(
            f"{folder} holds other pairs ({'; '.join(changes[:4])}); "
            "name another out, or use --resume none"
        )
    say(f"{folder} is there already: {len(pairs)} pairs")
    return True


if __name__ == "__main__":
    main()
