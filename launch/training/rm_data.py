"""Read the preference pairs of a DeScore run, and leave out videos that cannot be decoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import exit_with_error

if TYPE_CHECKING:
    from launch.schemas.training import ColdStartRun, DualRlRun, PairFiles
    from rm.data import Pair, PairTable


def read_tables(
    run: ColdStartRun | DualRlRun, **options: Any
) -> tuple[PairTable, list[Pair]]:
    """Read the training table up to its limit and the first held-out pairs.

    Exits with code 2 if a table is not usable.

    options  go to `rm.data.read_pairs`, for tables of the descore layout
    """
    from common.log import say
    from rm.repeated_pairs import describe_overlap

    # Read both tables before the long work starts, so that mistakes show early.
    table = read_table(run.data, run.data.train, options)
    heldout: list[Pair] = []
    if run.data.heldout is not None:
        heldout_table = read_table(run.data, run.data.heldout, options)
        heldout = list(heldout_table.pairs[: run.heldout_pairs])
    if run.data.limit is not None:
        table = replace(table, pairs=table.pairs[: run.data.limit])
        say(f"training on the first {len(table.pairs)} pairs")
    shared = describe_overlap(table.pairs, heldout)
    if shared:
        say(shared)
    return table, heldout


def read_table(data: PairFiles, path: str, options: dict[str, Any]) -> PairTable:
    """Read a table; exit with code 2 if it is wrong or too many of its rows are."""
    from common.log import say
    from rm.benchmarks import read_benchmark
    from rm.data import read_pairs

    try:
        if data.layout == "descore":
            table = read_pairs(path, columns=data.columns, **options)
        else:
            table = read_benchmark(
                path, data.layout, dimension="Overall", videos=data.videos
            )
    except ValueError as error:
        exit_with_error(str(error))
    say(table.report())

    # Rows that are left out cost data: too many of them are an error.
    bad = len(table.problems)
    rows = bad + len(table.pairs) + table.invalid
    if bad > data.max_bad_share * rows:
        exit_with_error(
            f"{table.path}: {bad} of {rows} rows are bad, more than "
            f"data.max_bad_share={data.max_bad_share:g} of them: {table.problems[0]}"
        )
    return table


def usable_pairs(
    run: ColdStartRun | DualRlRun, pairs: list[Pair], heldout: list[Pair]
) -> tuple[list[Pair], list[Pair]]:
    """Return the training and held-out pairs whose videos can be decoded.

    The others are listed in run_dir/bad_samples.jsonl. Exits with code 2 if more than
    ``data.max_bad_share`` of either are bad, or all are. All ranks call it and share the
    work.
    """
    from common import distributed
    from common.files import replace_text
    from common.log import say
    from rm.video_check import split_pairs

    if not run.data.check_videos:
        return pairs, heldout

    # Decode every video, and split the pairs by the result.
    files: set[Path] = set()
    for pair in [*pairs, *heldout]:
        files.update((pair.video_A, pair.video_B))
    bad_files = checked(sorted(files), run.run_dir)
    sound_pairs, bad_pairs = split_pairs(pairs, bad_files)
    sound_heldout, bad_heldout = split_pairs(heldout, bad_files)

    # List the bad pairs.
    lines = [{"of": "pairs", **record} for record in bad_pairs]
    lines += [{"of": "held-out pairs", **record} for record in bad_heldout]
    out = Path(run.run_dir) / "bad_samples.jsonl"
    if lines and distributed.is_main():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_text(out, text)

    # Exit if too many pairs are bad.
    counts = {
        "pairs": (len(pairs), len(bad_pairs)),
        "held-out pairs": (len(heldout), len(bad_heldout)),
    }
    share = run.data.max_bad_share
    for name, (total, bad) in counts.items():
        if bad:
            say(
                f"{bad} of {total} {name} have a video that cannot be decoded and are left "
                f"out, see {out}"
            )
        if total and (bad == total or bad > share * total):
            exit_with_error(
                f"{bad} of {total} {name} are more than data.max_bad_share={share:g} of them"
            )
    return sound_pairs, sound_heldout


def checked(files: list[Path], run_dir: str) -> dict[Path, str]:
    """Return the files that cannot be decoded, with the reason.

    A run that is started again reads the result from its folder, if no file has changed.
    All ranks call it.
    """
    from common import distributed
    from common.files import read_json, write_json
    from common.log import say
    from rm.video_check import bad_videos, stamp

    # The result of an earlier start.
    record = Path(run_dir) / "checked_videos.json"
    stamp_now = None
    bad = None
    if distributed.is_main():
        stamp_now = stamp(files)
        if record.is_file():
            earlier = read_json(record)
            if earlier["stamp"] == stamp_now:
                bad = earlier["bad"]
    bad = distributed.from_main(bad)

    # Or decode, on all ranks.
    if bad is None:
        say(f"decoding {len(files)} videos once, before anything is trained on them")
        share = files[distributed.rank() :: distributed.world_size()]
        bad = {}
        for bad_of_rank in distributed.gather_objects(bad_videos(share)):
            bad.update({str(file): why for file, why in bad_of_rank.items()})
        if distributed.is_main():
            write_json(record, {"stamp": stamp_now, "bad": bad})
    return {Path(file): why for file, why in bad.items()}
