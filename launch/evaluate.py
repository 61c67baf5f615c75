"""Measure a generator, or a reward model, on held-out data, with 95 % intervals.

    python launch/evaluate.py generator --config configs/wan/evaluate.yaml adapter=runs/grpo/final out=runs/eval
    deepspeed --num_accelerators 2 launch/evaluate.py rm --config configs/wan/evaluate_rm.yaml out=runs/eval_rm
    python launch/evaluate.py vbench --config configs/wan/evaluate_vbench.yaml python=VBENCH_ENV/bin/python

The first two write config.yaml, results.jsonl (a row for every video or pair) and summary.json, {name: {mean, ci95, n,
...}}; VBench's table has a docstring of its own, in `launch.vbench_evaluation`.
Ranks share the rows. A killed evaluation goes on where it was; another configuration in the same folder is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignment.config import RewardConfig
from alignment.rewards import factory_of
from common.config import dump
from generator.config import GeneratorConfig
from launch.command import read_command
from launch.kinds import take_kind
from launch.vbench_runs import VbenchEvaluation

if TYPE_CHECKING:
    from launch.rows import Row, RowTable

NOT_IN_A_ROW = ("out", "batch", "limit", "resamples")  # settings that change no row


@dataclass(frozen=True)
class GeneratorEvaluation:
    """Sample by the plain ODE and let every reward judge. Prompt i is sampled from derive_seed(seed, "evaluate", i).

    adapter      folder of a trained adapter, null for the generator as it is; same seeds, so videos compare in pairs
    rewards      as in a training run; weights are ignored
    limit        use only the first prompts of the file
    batch        videos sampled, decoded and judged at once on each rank
    keep_videos  how many are written to videos/, the first ones
    resamples    of the bootstrap
    """

    out: str
    prompts: str
    generator: GeneratorConfig
    rewards: dict[str, RewardConfig]
    adapter: str | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 8
    scheduler: Literal["euler", "pipeline"] = "euler"
    keep_videos: int = 16
    crf: int = 12
    resamples: int = 10_000

    def __post_init__(self) -> None:
        problems = _positive(self, "batch", "limit", "resamples")
        if self.keep_videos < 0:
            problems.append(f"keep_videos must be at least 0, got {self.keep_videos}")
        if not 0 <= self.crf <= 51:
            problems.append(f"crf must be in 0..51, got {self.crf}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        _check("GeneratorEvaluation", problems)
        for name, reward in self.rewards.items():
            factory_of(name, reward)


@dataclass(frozen=True)
class RewardEvaluation:
    """Let a DeScore judge both videos of every pair, thinking first, and compare with what people preferred.

    pairs      a CSV, or a folder that holds one; its own chains of thought are not read
    layout     its columns, see `rm.benchmarks`: the training table, VideoGen-RewardBench, GenAI-Bench or in-domain
    dimension  of VideoGen-RewardBench: VQ, MQ, TA (DeScore's column) or Overall
    videos     folder of the benchmark's videos; null is the CSV's
    options    keyword arguments of `rm.scorer.DeScoreScorer.load`
    limit      use only the first pairs
    batch      pairs judged at once on each rank
    resamples  of the bootstrap over pairs
    """

    out: str
    checkpoint: str
    pairs: str
    layout: Literal["descore", "videogen", "genai", "indomain"] = "descore"
    dimension: Literal["VQ", "MQ", "TA", "Overall"] = "TA"
    videos: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    batch: int = 4
    resamples: int = 2_000

    def __post_init__(self) -> None:
        _check("RewardEvaluation", _positive(self, "batch", "limit", "resamples"))


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
    from launch.refuse import refuse, refusing
    from launch.rows import all_ranks

    if cfg.adapter is not None and not Path(cfg.adapter).is_dir():
        refuse(f"adapter: there is no folder {cfg.adapter}")
    with all_ranks():
        from alignment.data import read_prompts
        from common.distributed import derive_seed

        with refusing():
            prompts = read_prompts(cfg.prompts)[: cfg.limit]
            inputs = [cfg.prompts, cfg.generator.path, cfg.adapter, *(r.checkpoint for r in cfg.rewards.values())]
            table = open_table(cfg, inputs, resume)
        own = [
            {"index": i, "prompt": prompts[i], "seed": derive_seed(cfg.seed, "evaluate", i)}
            for i in begin(cfg, table, len(prompts))
        ]
        if own:
            judge_samples(cfg, own, table)
        rows = table.finish([(i,) for i in range(len(prompts))])
        conclude(cfg.out, summarise(rows, seed=cfg.seed, resamples=cfg.resamples))


def judge_samples(cfg: GeneratorEvaluation, own: list[Row], table: RowTable) -> None:
    """Sample, judge and write down this rank's rows, batch by batch."""
    from common.log import progress, say
    from launch.compose import build_rewards, quiet, trained_generator
    from launch.refuse import refusing
    from launch.rows import batches, score_fields

    quiet()
    from common.video_io import write_mp4

    say(f"loading the generator {cfg.generator.path} and the rewards {', '.join(cfg.rewards)}")
    with refusing():
        generator = trained_generator(cfg.generator, cfg.adapter)
        rewards = build_rewards(cfg.rewards)
    folder, fps = Path(cfg.out) / "videos", cfg.generator.fps
    folder.mkdir(parents=True, exist_ok=True)
    for part in progress(batches(own, cfg.batch), -(-len(own) // cfg.batch), "evaluate"):
        prompts = [row["prompt"] for row in part]
        clean = generator.sample(prompts, seeds=[row["seed"] for row in part], scheduler=cfg.scheduler)
        video_BTYXC = generator.decode(clean)
        scores = {name: reward.score(video_BTYXC, prompts, fps=fps) for name, reward in rewards.items()}
        for b, row in enumerate(part):
            row |= score_fields(scores, b) | {"video": None}
            if row["index"] < cfg.keep_videos:
                row["video"] = f"videos/{row['index']:04d}.mp4"
                write_mp4(Path(cfg.out) / row["video"], video_BTYXC[b], fps, crf=cfg.crf)
        table.add(part)


def summarise(rows: Sequence[Row], *, seed: int, resamples: int) -> dict[str, Any]:
    """{reward: interval, "reward.part": interval}: MEAN and bootstrap over prompts, unjudged ones counted."""
    from common.bootstrap import mean_ci95

    columns = {name: [row["rewards"].get(name) for row in rows] for name in _names(row["rewards"] for row in rows)}
    for name in _names(row["parts"] for row in rows):
        found = [row["parts"].get(name, {}) for row in rows]
        columns |= {f"{name}.{part}": [parts.get(part) for parts in found] for part in _names(found)}
    return {name: mean_ci95(values, seed=seed, resamples=resamples).as_dict() for name, values in columns.items()}


def _names(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(name for one in dicts for name in one))


# ------------------------------------------------------------------ reward model


def evaluate_rm(cfg: RewardEvaluation, *, resume: str = "auto") -> None:
    """The pairs of this rank, then the summary on rank 0."""
    from launch.refuse import refuse, refusing
    from launch.rows import all_ranks

    if not Path(cfg.checkpoint).is_dir():
        refuse(f"checkpoint: there is no folder {cfg.checkpoint}")
    with all_ranks():
        from common.log import say
        from launch.pair_rows import judge_pairs, summarise_pairs
        from rm.benchmarks import read_benchmark
        from rm.model import DeScore

        with refusing():
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
    from launch import vbench_evaluation

    vbench_evaluation.evaluate_vbench(cfg, resume=resume)


# ------------------------------------------------------------------ both


def open_table(cfg: Any, inputs: Iterable[str | None], resume: str) -> RowTable:
    """The results of this configuration on these files. Raises ValueError where there are results of another."""
    from common.run_record import plain
    from launch.rows import RowTable, fingerprint

    settings = {name: value for name, value in plain(cfg).items() if name not in NOT_IN_A_ROW}
    files = {file: fingerprint(file) for file in inputs if file}
    return RowTable(Path(cfg.out) / "results.jsonl", identity={**settings, "files": files}, resume=resume)


def begin(cfg: Any, table: RowTable, count: int) -> list[int]:
    """Say how much there is to do; the indices that are left to this rank."""
    from common.distributed import is_main
    from common.log import say

    keys = [(index,) for index in range(count)]
    left = sum(key not in table.done for key in keys)
    if is_main():
        dump(cfg, cfg.out)
        if left:
            (Path(cfg.out) / "summary.json").unlink(missing_ok=True)
    say(f"{left} of {count} to do" + (f", {count - left} are in {table.path}" if left < count else ""))
    return [index for (index,) in table.share(keys)]


def conclude(out: str, summary: dict[str, Any]) -> None:
    """Write summary.json and show it."""
    from common.distributed import is_main
    from common.log import say
    from launch.rows import write_json

    if not is_main():
        return
    write_json(Path(out) / "summary.json", summary)
    for name, value in summary.items():
        if isinstance(value, dict) and value["mean"] is not None:
            low, high = value["ci95"]
            missing = f", {value['missing']} unjudged" if value["missing"] else ""
            say(f"{name:>24}  {value['mean']:8.4f}  95 % [{low:.4f}, {high:.4f}]  n = {value['n']}{missing}")
        else:
            say(f"{name:>24}  {'not judged' if isinstance(value, dict) else value}")
    say(f"results are in {out}")


def _positive(cfg: Any, *names: str) -> list[str]:
    values = {name: getattr(cfg, name) for name in names}
    return [
        f"{name} must be at least 1, got {value}" for name, value in values.items() if value is not None and value < 1
    ]


def _check(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


if __name__ == "__main__":
    main()
