"""One HTML file about some runs: curves, base and tuned videos at the same seeds, chains of thought, numbers.

    python launch/report.py runs/demo --out runs/demo/report.html
    python launch/report.py runs/grpo --out runs/grpo/report.html
    python launch/report.py --base runs/eval_base --tuned runs/eval_tuned --grpo runs/grpo --out report.html

A folder's runs and evaluations are found by the files in them, whatever they are called; of several of one kind one has
the page, the others a section. The page needs no network and no other file: videos are inside. What has no data is left
out, and it says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.files import replace_text
from launch.reporting.data import KINDS, BrokenFileError, Runs
from launch.reporting.find_runs import discover, read_manifest

TEMPLATES = Path(__file__).resolve().parent / "templates"
_HELP = {
    "cold_start": "stage 1 of DeScore (launch/cold_start.py)",
    "grpo": "an alignment run (launch/grpo.py)",
    "dpo": "an alignment run on pairs (launch/dpo.py)",
    "rm": "an evaluation of a reward model (launch/evaluate.py rm)",
    "base": "an evaluation of the base generator (launch/evaluate.py generator)",
    "tuned": "an evaluation of the tuned generator, same prompts and seeds",
    "dpo_tuned": "an evaluation of the generator that learned from pairs, same prompts and seeds",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="a run folder, or one that holds some, or a manifest .json",
    )
    parser.add_argument(
        "--out", type=Path, help="the .html to write; report.html in the folder"
    )
    parser.add_argument("--title")
    parser.add_argument(
        "--videos",
        type=int,
        default=12,
        help="prompts whose videos are shown side by side",
    )
    parser.add_argument(
        "--max-mb",
        type=float,
        default=64.0,
        help="of videos in the file; further ones are left out",
    )
    for kind in KINDS:
        option = f"--{kind.replace('_', '-')}"
        parser.add_argument(
            option, type=Path, metavar="DIR", dest=kind, help=_HELP[kind]
        )
    args = parser.parse_args(argv)
    if args.videos < 0 or args.max_mb < 0:
        parser.exit(2, f"{parser.prog}: --videos and --max-mb must not be negative\n")
    try:
        title, runs = _runs(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        page = render(
            runs,
            title=args.title or title or _title(runs),
            videos=args.videos,
            max_mb=args.max_mb,
        )
    except BrokenFileError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    out = (
        args.out
        or (args.folder if args.folder and args.folder.is_dir() else Path())
        / "report.html"
    )
    write(out, page)
    sources = [*runs.named().items(), *((one.kind, one.folder) for one in runs.more)]
    print(
        f"{out}: {len(page.encode()) / 1e6:.1f} MB, from {', '.join(f'{folder} ({kind})' for kind, folder in sources)}"
    )


def _runs(args: argparse.Namespace) -> tuple[str | None, Runs]:
    """What the command line names; options go before what was found. Raises ValueError when that is nothing."""
    title, runs = None, Runs()
    if args.folder is not None:
        if args.folder.suffix == ".json":
            title, runs = read_manifest(args.folder)
        else:
            runs = discover(args.folder)
    given = {
        kind: getattr(args, kind) for kind in KINDS if getattr(args, kind) is not None
    }
    for name, folder in given.items():
        if not folder.is_dir():
            raise ValueError(f"--{name.replace('_', '-')}: there is no folder {folder}")
    runs = replace(runs, **given)
    if not runs.named() and not runs.more:
        raise ValueError(
            "name a run folder, a manifest, or at least one of the options"
        )
    return title, runs


def _title(runs: Runs) -> str:
    if {"grpo", "tuned", "dpo", "dpo_tuned"} & runs.named().keys():
        return "Alignment report"
    kinds = {*runs.named(), *(one.kind for one in runs.more)}
    return (
        "Reward model report"
        if {"rm", "cold_start", "dual_rl"} & kinds
        else "Evaluation report"
    )


def render(runs: Runs, *, title: str, videos: int = 12, max_mb: float = 64.0) -> str:
    """The page. Every text from a run is escaped; the charts' SVG alone is put in as it is."""
    import jinja2

    from launch.reporting import data, sections

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(sections.FILTERS)
    store = sections.Videos(int(max_mb * 1e6))
    columns = data.columns_of(runs)
    steps = data.sampled_steps(runs.grpo)
    shown_steps = sorted({min(steps), max(steps)}) if steps else []
    values = {
        "title": title,
        "accuracy": data.summary(runs.rm),
        "rewards": data.compare(runs, [name for name in columns if "." not in name]),
        "dpo_rewards": data.compare(runs, columns, after_dpo=True)
        if runs.dpo_tuned is not None
        else [],
        "dpo_charts": sections.dpo_charts(runs.dpo),
        "parts": data.compare(runs, [name for name in columns if "." in name]),
        "cards": sections.side_by_side(runs, store, videos),
        "grpo_charts": sections.grpo_charts(runs.grpo),
        "cold_start_charts": sections.cold_start_charts(runs.cold_start),
        "distributions": sections.distributions(runs),
        "seconds": data.seconds_by_phase(data.metrics(runs.grpo)),
        "samples": [
            (step, sections.group_cards(steps[step], store)) for step in shown_steps
        ],
        "pairs": sections.pair_cards(runs.rm, store),
        "further": sections.further(runs),
        "files": sections.files_of(runs),
        "runs": {name: str(folder) for name, folder in runs.named().items()},
        "missing": sections.missing(runs),
        "left_out": store.left_out,
        "max_mb": max_mb,
    }
    return environment.get_template("report.html").render(values)


def write(path: Path, page: str) -> None:
    """A reader sees the old page or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)


if __name__ == "__main__":
    sys.exit(main())
