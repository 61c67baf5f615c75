"""TODO."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import exit_with_error

if TYPE_CHECKING:
    from launch.schemas.training import ColdStartRun, DualRlRun
    from rm.data import Pair, PairTable


def read_tables(
    cfg: ColdStartRun | DualRlRun, **options: Any
) -> tuple[PairTable, list[Pair]]:
    """The training table up to its limit and the first held-out pairs; exit with code 2 when a table is not usable.

    options  go to `rm.data.read_pairs`, of the descore layout
    """
    from common.log import say
    from rm.benchmarks import read_benchmark
    from rm.data import read_pairs

    def table(path: str) -> PairTable:
        if cfg.data.layout == "descore":
            return read_pairs(path, **options)
        return read_benchmark(
            path, cfg.data.layout, dimension="Overall", videos=cfg.data.videos
        )

    tables = []
    for path in (cfg.data.train, cfg.data.heldout):
        try:
            tables.append(table(path) if path is not None else None)
        except ValueError as error:
            exit_with_error(str(error))
        if tables[-1] is not None:
            say(tables[-1].report())
            if problem := too_bad(tables[-1], cfg.data.max_bad_share):
                exit_with_error(problem)
    train_table, heldout_table = tables
    if cfg.data.limit is not None:
        train_table = replace(train_table, pairs=train_table.pairs[: cfg.data.limit])
        say(f"training on the first {len(train_table.pairs)} pairs")
    return train_table, list(
        heldout_table.pairs[: cfg.heldout_pairs]
    ) if heldout_table else []


def too_bad(table: PairTable, share: float) -> str:
    """What is said of a table with more bad rows than this share of all; nothing of a better one."""
    bad, rows = (
        len(table.problems),
        len(table.problems) + len(table.pairs) + table.invalid,
    )
    if bad <= share * rows:
        return ""
    return f"{table.path}: {bad} of {rows} rows are bad, more than data.max_bad_share={share:g} of them: {table.problems[0]}"


def usable(
    cfg: ColdStartRun | DualRlRun, pairs: list[Pair], heldout: list[Pair]
) -> tuple[list[Pair], list[Pair]]:
    """The pairs, and the held-out ones, whose videos can be decoded; the others go to run_dir/bad_samples.jsonl. All
    ranks call it and share the work. Exit with code 2 when more than ``data.max_bad_share`` of either are bad, or all are.
    """
    from common import distributed
    from common.files import replace_text
    from common.log import say
    from rm.video_check import split_pairs

    if not cfg.data.check_videos:
        return pairs, heldout
    files = sorted(
        {file for pair in [*pairs, *heldout] for file in (pair.video_A, pair.video_B)}
    )
    bad = checked(files, cfg.run_dir)
    sets = {
        name: (part, *split_pairs(part, bad))
        for name, part in (("pairs", pairs), ("held-out pairs", heldout))
    }
    lines = [
        {"of": name, **record}
        for name, (_, _, records) in sets.items()
        for record in records
    ]
    out = Path(cfg.run_dir) / "bad_samples.jsonl"
    if lines and distributed.is_main():
        replace_text(
            out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    for name, (part, sound, records) in sets.items():
        if records:
            say(
                f"{len(records)} of {len(part)} {name} have a video that cannot be decoded and are left out, see {out}"
            )
        if part and (not sound or len(records) > cfg.data.max_bad_share * len(part)):
            exit_with_error(
                f"{len(records)} of {len(part)} {name} are more than data.max_bad_share={cfg.data.max_bad_share:g} of them"
            )
    return sets["pairs"][1], sets["held-out pairs"][1]


def checked(files: list[Path], run_dir: str) -> dict[Path, str]:
    """The files that cannot be decoded, and why. A run that is started again, with the same files as they were, knows
    it from its folder.
    """
    from common import distributed
    from common.files import replace_text
    from common.log import say
    from rm.video_check import bad_videos, stamp

    kept = Path(run_dir) / "checked_videos.json"
    now, known = None, None
    if distributed.is_main():
        now = stamp(files)
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    bad = distributed.from_main(
        known["bad"] if known and known["stamp"] == now else None
    )
    if bad is None:
        say(f"decoding {len(files)} videos once, before anything is trained on them")
        found = distributed.gather_objects(
            bad_videos(files[distributed.rank() :: distributed.world_size()])
        )
        bad = {str(file): why for one in found for file, why in one.items()}
        if distributed.is_main():
            replace_text(
                kept,
                json.dumps({"stamp": now, "bad": bad}, indent=1, ensure_ascii=False)
                + "\n",
            )
    return {Path(file): why for file, why in bad.items()}
