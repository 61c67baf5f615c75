"""Measure a generator or a reward model on held-out data, with 95 % intervals.

    python launch/evaluate.py generator --config configs/wan/evaluate.yaml adapter=FOLDER out=FOLDER
    deepspeed launch/evaluate.py rm --config configs/wan/evaluate_rm.yaml out=runs/eval_rm
    python launch/evaluate.py vbench --config configs/wan/evaluate_vbench.yaml

``generator`` and ``rm`` write config.yaml, results.jsonl (a row for every video or pair) and
summary.json, {name: {mean, ci95, n, ...}}. `launch.vbench_eval.evaluate` describes what ``vbench``
writes. Ranks share the rows. A killed evaluation continues when it is started again; a folder with
results of other settings is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import dump
from common.files import write_json
from launch.command import run_command, take_kind
from launch.evaluation.generator import score_samples, summarise
from launch.schemas.evaluation import GeneratorEvaluation, RewardEvaluation
from launch.schemas.vbench import VbenchEvaluation

if TYPE_CHECKING:
    from launch.evaluation.results_table import ResultsTable

# Settings that change no row.
NOT_IN_A_ROW = ("out", "batch", "limit", "resamples")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluation that the first word of the command line names."""
    kinds = {
        "generator": (GeneratorEvaluation, evaluate_generator),
        "rm": (RewardEvaluation, evaluate_rm),
        "vbench": (VbenchEvaluation, evaluate_vbench),
    }
    words = list(sys.argv[1:] if argv is None else argv)
    kind = take_kind(words, kinds)

    # Without a kind there is only help to give.
    if kind is None:
        if "-h" in words or "--help" in words:
            print(__doc__)
            sys.exit(0)
        print(__doc__, file=sys.stderr)
        sys.exit(2)

    # Read the config of the kind and run it.
    schema, evaluate = kinds[kind]
    run_command(
        schema,
        lambda command: evaluate(command.cfg, resume=command.resume),
        words,
        description=__doc__,
    )


def evaluate_generator(cfg: GeneratorEvaluation, *, resume: str = "auto") -> None:
    """Sample the held-out prompts, score the videos and summarise the scores."""
    from common.cli import exit_with_error, user_errors
    from launch.evaluation.results_table import all_ranks

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        exit_with_error(f"adapter: there is no folder {cfg.adapter}")
    with all_ranks():
        from alignment.prompts import image_files, read_image_prompts
        from common.distributed import derive_seed
        from common.log import say
        from common.types import text_of
        from launch.compose import quiet, say_long_prompts

        # The prompts, and the table of everything that a row depends on.
        inputs = [cfg.prompts, cfg.generator.path, cfg.adapter]
        inputs.append(cfg.generator.target_file)
        for reward in cfg.rewards.values():
            inputs += reward.files
        with user_errors():
            prompts = read_image_prompts(cfg.prompts)[: cfg.limit]
            inputs += image_files(prompts).values()
            table = open_table(cfg, inputs, resume)

        # This rank's missing rows, then the rows of all ranks.
        rows = [
            {
                "index": i,
                "prompt": text_of(prompts[i]),
                "seed": derive_seed(cfg.seed, "evaluate", i),
            }
            for i in begin(cfg, table, len(prompts))
        ]
        if rows:
            quiet()
            with user_errors():
                say_long_prompts(prompts, cfg.generator)
            score_samples(cfg, prompts, rows, table)
        conclude(cfg, table, len(prompts), summarise)
        folders = f"--base FOLDER --tuned {cfg.out}"
        if cfg.adapter is None:
            folders = f"--base {cfg.out} --tuned FOLDER"
        say(f"next: python launch/report.py {folders} --out report.html")


def evaluate_rm(cfg: RewardEvaluation, *, resume: str = "auto") -> None:
    """Score both videos of held-out pairs and summarise the agreement with people."""
    from common.cli import exit_with_error, user_errors
    from launch.evaluation.results_table import all_ranks

    if not Path(cfg.checkpoint).is_dir():
        exit_with_error(f"checkpoint: there is no folder {cfg.checkpoint}")
    with all_ranks():
        from common.log import say
        from launch.evaluation.preference import score_pairs, summarise_pairs
        from rm.benchmarks import read_benchmark
        from rm.model import DeScore

        # The pairs, with a label for each dimension where the model has several.
        with user_errors():
            dimensions = DeScore.dimensions_in(cfg.checkpoint)
            benchmark = read_benchmark(
                cfg.pairs,
                cfg.layout,
                dimension=cfg.dimension,
                videos=cfg.videos,
                columns=cfg.columns,
                dimensions=dimensions if len(dimensions) > 1 else (),
            )
            table = open_table(cfg, [str(benchmark.path), cfg.checkpoint], resume)
        say(benchmark.report())

        # This rank's missing pairs, then the rows of all ranks.
        pairs = benchmark.pairs[: cfg.limit]
        missing = begin(cfg, table, len(pairs))
        if missing:
            score_pairs(cfg, pairs, missing, table)
        conclude(cfg, table, len(pairs), summarise_pairs)
        is_raw = cfg.options.get("thinking") != "adaptive"
        if is_raw and not cfg.options.get("calibrated"):
            say(f"next: python launch/calibrate.py {cfg.checkpoint} {cfg.out}")


def evaluate_vbench(cfg: VbenchEvaluation, *, resume: str = "auto") -> None:
    """Make a table of VBench's result files; there is nothing to resume."""
    from launch.vbench_eval import evaluate as vbench_evaluation

    vbench_evaluation.evaluate_vbench(cfg)


def open_table(
    cfg: Any,
    inputs: Iterable[str | None],
    resume: str,
) -> ResultsTable:
    """Open the results of this configuration on these input files.

    Raises ValueError where the folder holds results of other settings.
    """
    from common.run_record import plain
    from launch.evaluation.results_table import ResultsTable, fingerprint

    # A row depends on the settings and on the content of the input files.
    identity = plain(cfg)
    for name in NOT_IN_A_ROW:
        identity.pop(name, None)
    identity["files"] = {file: fingerprint(file) for file in inputs if file}
    path = Path(cfg.out) / "results.jsonl"
    return ResultsTable(path, identity=identity, resume=resume)


def begin(
    cfg: Any,
    table: ResultsTable,
    count: int,
) -> list[int]:
    """Write config.yaml, report the number of missing rows and return this rank's indices."""
    from common.distributed import is_main
    from common.log import say

    keys = [(index,) for index in range(count)]
    missing = [key for key in keys if key not in table.done]
    if is_main():
        dump(cfg, cfg.out)
        # A summary of fewer rows would be out of date.
        if missing:
            (Path(cfg.out) / "summary.json").unlink(missing_ok=True)

    # Report how many rows are left.
    line = f"{len(missing)} of {count} to do"
    if len(missing) < count:
        line += f", {count - len(missing)} are in {table.path}"
    say(line)
    return [index for (index,) in table.share(keys)]


def conclude(
    cfg: Any,
    table: ResultsTable,
    count: int,
    summarise: Callable[..., dict[str, Any]],
) -> None:
    """Summarise the rows of all ranks in summary.json, and print it, on rank 0."""
    from common.distributed import is_main
    from common.log import say

    rows = table.finish([(i,) for i in range(count)])
    if not is_main():
        return
    summary = summarise(rows, seed=cfg.seed, resamples=cfg.resamples)
    write_json(Path(cfg.out) / "summary.json", summary)
    # Counts and thresholds are numbers, the rest are intervals.
    for name, value in summary.items():
        text = _format_interval(value) if isinstance(value, dict) else value
        say(f"{name:>24}  {text}")
    say(f"results are in {cfg.out}")


def _format_interval(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "could not be scored"
    low, high = value["ci95"]
    text = f"{value['mean']:8.4f}  95 % [{low:.4f}, {high:.4f}]  n = {value['n']}"
    if value["missing"]:
        text += f", {value['missing']} could not be scored"
    return text


if __name__ == "__main__":
    main()
