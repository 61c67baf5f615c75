"""Write an HTML file about runs: curves, base and tuned videos at the same seeds, CoTs, numbers.

    python launch/report.py runs/demo --out runs/demo/report.html
    python launch/report.py runs/grpo --out runs/grpo/report.html
    python launch/report.py --base runs/eval_base --tuned runs/eval_tuned --grpo runs/grpo

The runs and evaluations of a folder are recognised by their files, not by their names. Of several
of a kind, the sections show the first and the end of the page the others. The page needs no network
and no other file: videos are inside. It lists what could not be shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import command_parser, user_errors
from common.files import replace_text
from launch.reporting.data import KINDS, Runs
from launch.reporting.find_runs import discover

TEMPLATES = Path(__file__).resolve().parent / "templates"


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    # Everything is read before the file is written.
    with user_errors():
        if args.videos < 0 or args.max_mb < 0:
            raise ValueError("--videos and --max-mb must not be negative")
        runs = _runs(args)
        title = args.title or f"Report of {args.folder or 'runs'}"
        page = render(
            runs,
            title=title,
            videos=args.videos,
            max_mb=args.max_mb,
        )

    # A reader sees the old page or the new one.
    out = args.out or (args.folder or Path()) / "report.html"
    out.parent.mkdir(
        parents=True,
        exist_ok=True,
    )
    replace_text(out, page)
    sources = ", ".join(f"{folder} ({kind})" for kind, folder in runs.all())
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, from {sources}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        type=Path,
        help="a run folder, or a folder that holds some",
    )
    add(
        "--out",
        type=Path,
        help="the .html to write; report.html in the folder",
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


def _runs(args: argparse.Namespace) -> Runs:
    """Find the runs of the command line; an option replaces what the folder holds.

    Raises ValueError without any.
    """
    # The folder first, then the options.
    runs = discover(args.folder) if args.folder is not None else Runs({})
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


def render(
    runs: Runs,
    *,
    title: str,
    videos: int = 12,
    max_mb: float = 64.0,
) -> str:
    """Render the page. Texts of a run are escaped; only the SVG of a chart enters as it is."""
    import jinja2

    from launch.reporting import data, sections
    from launch.reporting.metric_charts import metric_charts

    # Missing values in the template are errors, not empty texts.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=sections.number, clean=sections.clean)

    # Columns of the comparison: rewards, and their parts as "reward.part".
    shown = runs.shown
    columns = data.summary(shown.get("base")) | data.summary(shown.get("tuned"))
    rewards = [name for name in columns if "." not in name]
    parts = [name for name in columns if "." in name]
    after_dpo = columns if "dpo_tuned" in shown else ()

    # Rollouts of the first and the last sampled step.
    steps = data.sampled_steps(shown.get("grpo"))
    ends = sorted({min(steps), max(steps)}) if steps else []

    # Videos enter in the order of the page until there is no room.
    store = sections.Videos(int(max_mb * 1e6))
    cards = sections.evaluated_videos(runs, store, videos)
    samples = [(step, sections.group_cards(steps[step], store)) for step in ends]
    pairs = sections.pair_cards(shown.get("rm"), store)
    # The template leaves out empty sections.
    page = environment.get_template("report.html").render(
        title=title,
        runs=shown,
        accuracy=data.summary(shown.get("rm")),
        rewards=data.compare(runs, rewards),
        dpo_rewards=data.compare(runs, after_dpo, tuned="dpo_tuned"),
        parts=data.compare(runs, parts),
        cards=cards,
        samples=samples,
        pairs=pairs,
        grpo_charts=metric_charts("grpo", shown.get("grpo")),
        diagnoses=sections.diagnoses_of(shown.get("grpo")),
        dpo_charts=metric_charts("dpo", shown.get("dpo")),
        cold_start_charts=metric_charts("cold_start", shown.get("cold_start")),
        seconds=data.mean_seconds(data.metrics(shown.get("grpo"))),
        distributions=sections.distributions(runs),
        further=sections.further_runs(runs),
        files=sections.files_of(runs),
        missing=sections.missing(runs),
        left_out=store.left_out,
        max_mb=max_mb,
    )
    # Names of rewards and parts are a user's texts too.
    return sections.clean(page)


if __name__ == "__main__":
    sys.exit(main())
