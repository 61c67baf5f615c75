"""Say in words what is wrong with a run, how sure that is, and what to do.

    python launch/diagnose.py runs/grpo
    python launch/diagnose.py runs/grpo --evaluation runs/eval_tuned --json diagnosis.json

Reads metrics, settings, environment and, of GRPO, the measurements of the first updates; it loads
no model. Runs of launch/dpo.py, cold_start.py and dual_rl.py are judged by settings and metrics.
The exit code is 1 when something is certainly or likely wrong, and 0 when nothing is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import command_parser, user_errors
from common.files import replace_text
from launch.diagnosis.evidence import as_json
from launch.diagnosis.report import text_of
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import read_run


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with user_errors():
        # A folder that is no run ends with exit code 2.
        evidence = read_run(args.run, args.evaluation)
        diagnoses = diagnose(evidence)
        if args.json is not None:
            replace_text(args.json, as_json(diagnoses))
    # For people, then for scripts.
    print(text_of(evidence, diagnoses))
    sys.exit(1 if any(diagnosis.accuses for diagnosis in diagnoses) else 0)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a training run")
    add(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="an evaluation of what the run trained; those beside the run are found",
    )
    add("--json", type=Path, metavar="FILE", help="also write the diagnoses as JSON")
    return parser


if __name__ == "__main__":
    main()
