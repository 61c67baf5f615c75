"""Write an HTML file about runs: curves, base and tuned videos at the same seeds, CoTs, numbers.

    python launch/report.py runs/demo --out runs/demo/report.html
    python launch/report.py runs/grpo --watch
    python launch/report.py runs/grpo_a runs/grpo_b --out compared.html
    python launch/report.py --base runs/eval_base --tuned runs/eval_tuned --grpo runs/grpo

The runs and evaluations of a folder are recognised by their files, not by their names. Of several
of a kind, the sections show the first and the end of the page the others. Several folders are
compared: curves over each other, the settings that differ, videos at the same seeds. The page needs
no network and no other file: videos are inside. It lists what could not be shown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.cli import command_parser, user_errors
from common.files import replace_text
from launch.reporting.data import KINDS, Runs
from launch.reporting.find_runs import discover


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    # Everything is read before the file is written.
    with user_errors():
        if args.videos < 0 or args.max_mb < 0:
            raise ValueError("--videos and --max-mb must not be negative")
        if args.every < 1:
            raise ValueError("--every must be at least a second")
        refresh = args.every if args.watch else 0.0
        report = _report(args, refresh=refresh)

    out = _out(args)
    _write(out, report)
    size = len(report.page.encode()) / 1e6
    print(f"{out}: {size:.1f} MB, from {report.sources}")
    if args.watch:
        _watch(args, out, report)


@dataclass(frozen=True)
class RenderedPage:
    """A page, the runs that it is of in words, and whether all of them have finished."""

    page: str
    sources: str
    finished: bool


def _write(out: Path, report: RenderedPage) -> None:
    # A reader sees the old page or the new one.
    out.parent.mkdir(
        parents=True,
        exist_ok=True,
    )
    replace_text(out, report.page)


def _watch(args: argparse.Namespace, out: Path, report: RenderedPage) -> None:
    """Write the page again and again until all runs have finished, or Ctrl-C."""
    if not report.finished:
        print(f"writing it every {args.every:g} s until the runs end; Ctrl-C stops")
    with suppress(KeyboardInterrupt):
        while not report.finished:
            time.sleep(args.every)
            try:
                report = _report(args, refresh=args.every)
                _write(out, report)
            except (ValueError, OSError) as error:
                # A file that is just being replaced: the page of before stays.
                print(f"not written this time: {error}", file=sys.stderr)
    # The last page does not load itself again.
    with user_errors():
        _write(out, _report(args))
    print(f"{out}: the last page is written")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="a run folder, or a folder that holds some; several are compared",
    )
    add(
        "--out",
        type=Path,
        help="the .html to write; report.html in the folder, or here for several folders",
    )
    add("--title")
    add(
        "--videos",
        type=int,
        default=12,
        help="number of prompts whose videos are shown",
    )
    add(
        "--max-mb",
        type=float,
        default=64.0,
        help="largest size of all videos",
    )
    add(
        "--watch",
        action="store_true",
        help="write the page again while the runs go on; an open page follows",
    )
    add(
        "--every",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="with --watch: seconds between two pages",
    )
    # A folder of each kind.
    for kind, text in KINDS.items():
        option = f"--{kind.replace('_', '-')}"
        add(
            option,
            type=Path,
            metavar="DIR",
            dest=kind,
            help=text,
        )
    return parser


def _out(args: argparse.Namespace) -> Path:
    if args.out is not None:
        return args.out
    folder = args.folders[0] if len(args.folders) == 1 else Path()
    return folder / "report.html"


def _report(args: argparse.Namespace, *, refresh: float = 0.0) -> RenderedPage:
    """Read the runs of the command line and render their page."""
    from launch.reporting.page import PageOptions, render, render_peers
    from launch.reporting.peers import find_peers
    from launch.reporting.status import status_of

    options = PageOptions(
        args.title or _title(args.folders),
        videos=args.videos,
        max_mb=args.max_mb,
        refresh=refresh,
    )
    # One folder, or options, or folders that are compared.
    if len(args.folders) < 2:
        runs = _runs(args)
        root = args.folders[0] if args.folders else None
        page = render(runs, options, root)
        found = runs.all()
    else:
        if any(getattr(args, kind) is not None for kind in KINDS):
            raise ValueError(
                "several folders are compared: leave out the options of a kind"
            )
        peers = find_peers(args.folders)
        page = render_peers(peers, options)
        found = [run for peer in peers for run in peer.runs.all()]
    sources = ", ".join(f"{folder} ({kind})" for kind, folder in found)
    finished = all(status_of(kind, folder, "").finished for kind, folder in found)
    return RenderedPage(page, sources, finished)


def _title(folders: Sequence[Path]) -> str:
    from launch.reporting.texts import distinct_names

    if not folders:
        return "Report of runs"
    # The page may go to others, whom the folders above do not concern.
    return f"Report of {', '.join(distinct_names(folders))}"


def _runs(args: argparse.Namespace) -> Runs:
    """Find the runs of the command line; an option replaces what the folder holds.

    Raises ValueError without any.
    """
    # The folder first, then the options.
    runs = discover(args.folders[0]) if args.folders else Runs({})
    for kind in KINDS:
        folder = getattr(args, kind)
        if folder is None:
            continue
        if not folder.is_dir():
            raise ValueError(f"--{kind.replace('_', '-')}: there is no folder {folder}")
        runs.shown[kind] = folder
    if not runs.all():
        raise ValueError("name a run folder, or at least one of the options")
    return runs


if __name__ == "__main__":
    sys.exit(main())
