"""Measure a generator, or a reward model, on held-out data, with 95 % intervals.

    python launch/evaluate.py generator --config configs/wan/evaluate.yaml adapter=runs/grpo/final out=runs/eval
    deepspeed --num_accelerators 2 launch/evaluate.py rm --config configs/wan/evaluate_rm.yaml out=runs/eval_rm
    python launch/evaluate.py vbench --config configs/wan/evaluate_vbench.yaml python=VBENCH_ENV/bin/python

The first two write config.yaml, results.jsonl (a row for every video or pair) and summary.json, {name: {mean, ci95, n,
...}}; VBench's table has a docstring of its own, in `launch.vbench_eval.evaluate`.
Ranks share the rows. A killed evaluation goes on where it was; another configuration in the same folder is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import dump
from launch.command import read_command, take_kind
from launch.evaluation.generator import judge_samples, summarise
from launch.schemas.evaluation import GeneratorEvaluation, RewardEvaluation
from launch.schemas.vbench import VbenchEvaluation

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable

NOT_IN_A_ROW = ("out", "batch", "limit", "resamples")  # settings that change no row


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {
        "generator": (GeneratorEvaluation, evaluate_generator),
        "rm": (RewardEvaluation, evaluate_rm),
        "vbench": (VbenchEvaluation, evaluate_vbench),
    }
    words = list(sys.argv[1:] if argv is None else argv)
    kind = take_kind(words, kinds)
    if kind is None:
        asked_for_help = bool({"-h", "--help"}.intersection(words))
        print(__doc__, file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    schema, evaluate = kinds[kind]
    command = read_command(schema, words, description=schema.__doc__.splitlines()[0])
    evaluate(command.cfg, resume=command.resume)


# ------------------------------------------------------------------ generator


def evaluate_generator(cfg: GeneratorEvaluation, *, resume: str = "auto") -> None:
    """The rows of this rank, then the summary on rank 0."""
    from common.cli import exit_with_error, user_errors
    from launch.evaluation.results_table import all_ranks

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        exit_with_error(f"adapter: there is no folder {cfg.adapter}")
    with all_ranks():
        from alignment.prompts import read_prompts
        from common.distributed import derive_seed

        with user_errors():
            prompts = read_prompts(cfg.prompts)[: cfg.limit]
            inputs = [
                cfg.prompts,
                cfg.generator.path,
                cfg.adapter,
                *(r.checkpoint for r in cfg.rewards.values()),
            ]
            table = open_table(cfg, inputs, resume)
        own = [
            {
                "index": i,
                "prompt": prompts[i],
                "seed": derive_seed(cfg.seed, "evaluate", i),
            }
            for i in begin(cfg, table, len(prompts))
        ]
        if own:
            judge_samples(cfg, own, table)
        rows = table.finish([(i,) for i in range(len(prompts))])
        conclude(cfg.out, summarise(rows, seed=cfg.seed, resamples=cfg.resamples))


# ------------------------------------------------------------------ reward model


def evaluate_rm(cfg: RewardEvaluation, *, resume: str = "auto") -> None:
    """The pairs of this rank, then the summary on rank 0."""
    from common.cli import exit_with_error, user_errors
    from launch.evaluation.results_table import all_ranks

    if not Path(cfg.checkpoint).is_dir():
        exit_with_error(f"checkpoint: there is no folder {cfg.checkpoint}")
    with all_ranks():
        from common.log import say
        from launch.evaluation.preference import judge_pairs, summarise_pairs
        from rm.benchmarks import read_benchmark
        from rm.model import DeScore

        with user_errors():
            own = DeScore.dimensions_in(cfg.checkpoint)
            found = read_benchmark(
                cfg.pairs,
                cfg.layout,
                dimension=cfg.dimension,
                videos=cfg.videos,
                dimensions=own if len(own) > 1 else (),
            )
            table = open_table(cfg, [str(found.path), cfg.checkpoint], resume)
        say(found.report())
        pairs = found.pairs[: cfg.limit]
        own = begin(cfg, table, len(pairs))
        if own:
            judge_pairs(cfg, pairs, own, table)
        rows = table.finish([(i,) for i in range(len(pairs))])
        conclude(cfg.out, summarise_pairs(rows, seed=cfg.seed, resamples=cfg.resamples))


# ------------------------------------------------------------------ VBench


def evaluate_vbench(cfg: VbenchEvaluation, *, resume: str = "auto") -> None:
    """Here for its name only: it shares no row and no reward with the others."""
    from launch.vbench_eval import evaluate as vbench_evaluation

    vbench_evaluation.evaluate_vbench(cfg, resume=resume)


# ------------------------------------------------------------------ both


def open_table(cfg: Any, inputs: Iterable[str | None], resume: str) -> ResultsTable:
    """The results of this configuration on these files. Raises ValueError where there are results of another."""
    from common.run_record import plain
    from launch.evaluation.results_table import ResultsTable, fingerprint

    settings = {
        name: value for name, value in plain(cfg).items() if name not in NOT_IN_A_ROW
    }
    files = {file: fingerprint(file) for file in inputs if file}
    return ResultsTable(
        Path(cfg.out) / "results.jsonl",
        identity={**settings, "files": files},
        resume=resume,
    )


def begin(cfg: Any, table: ResultsTable, count: int) -> list[int]:
    """Say how much there is to do; the indices that are left to this rank."""
    from common.distributed import is_main
    from common.log import say

    keys = [(index,) for index in range(count)]
    left = sum(key not in table.done for key in keys)
    if is_main():
        dump(cfg, cfg.out)
        if left:
            (Path(cfg.out) / "summary.json").unlink(missing_ok=True)
    say(
        f"{left} of {count} to do"
        + (f", {count - left} are in {table.path}" if left < count else "")
    )
    return [index for (index,) in table.share(keys)]


def conclude(out: str, summary: dict[str, Any]) -> None:
    """Write summary.json and show it."""
    from common.distributed import is_main
    from common.log import say
    from launch.evaluation.results_table import write_json

    if not is_main():
        return
    write_json(Path(out) / "summary.json", summary)
    for name, value in summary.items():
        if isinstance(value, dict) and value["mean"] is not None:
            low, high = value["ci95"]
            missing = f", {value['missing']} unjudged" if value["missing"] else ""
            say(
                f"{name:>24}  {value['mean']:8.4f}  95 % [{low:.4f}, {high:.4f}]  n = {value['n']}{missing}"
            )
        else:
            say(f"{name:>24}  {'not judged' if isinstance(value, dict) else value}")
    say(f"results are in {out}")


if __name__ == "__main__":
    main()
