"""Write the certificate of a GRPO recipe: its first updates, with several seeds.

    python launch/diagnosis/certificate.py --config configs/shapes/grpo_oracle.yaml --seeds 6
    python launch/diagnosis/certificate.py --config configs/wan/grpo.yaml --seeds 0
    python launch/diagnosis/certificate.py --config configs/wan/grpo.yaml --run runs/a --run runs/b

Each seed is a short run of launch/grpo.py; runs that there are already are taken by --run. The
entry of the recipe in configs/certificates.json is replaced. With --seeds 0 nothing is run, and the
entry holds the recipe's settings only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import command_parser, exit_with_error
from common.config import load
from common.files import read_json, write_json
from common.run_record import plain, value_at
from launch.diagnosis.certificates import (
    FACTORS,
    FILE,
    MARGINS,
    REMEMBERED,
    band,
    identity,
    values_of,
)
from launch.diagnosis.evidence import Evidence
from launch.diagnosis.run_files import read_run
from launch.schemas.training import GrpoRun

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 5


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    names = list(args.config)
    # Runs that there are, or a short one for every seed.
    runs = [read_run(folder) for folder in args.run]
    seeds = 0 if runs else args.seeds
    with tempfile.TemporaryDirectory(prefix="certificate-") as folder:
        for seed in range(seeds):
            place = Path(folder) / f"seed-{seed}"
            run(names, args.override, seed=seed, place=place)
            runs.append(read_run(place))
            print(f"{' + '.join(names)}, seed {seed}: {len(runs[-1].steps)} updates")

    # The other recipes' entries stay.
    file = ROOT / FILE
    recipes = []
    if file.is_file():
        recipes = read_json(file)["recipes"]
    words = [f"--run {folder}" for folder in args.run] or [f"--seeds {seeds}"]
    made = certificate(names, args.override, runs, words)
    entries = [made]
    for entry in recipes:
        if entry["recipe"] != made["recipe"]:
            entries.append(entry)
    entries.sort(key=lambda entry: entry["recipe"])
    write_json(file, {"recipes": entries})
    print(file.relative_to(ROOT))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="YAML")
    add(
        "--run",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="made already",
    )
    add("--seeds", type=int, default=6, help="runs with seeds 0, 1, ...")
    add("override", nargs="*", help="a.b=c, for every run")
    return parser


def run(
    configs: Sequence[str],
    overrides: Sequence[str],
    *,
    seed: int,
    place: Path,
) -> None:
    """Make the first updates of a recipe."""
    command = [sys.executable, "launch/grpo.py"]
    for name in configs:
        command += ["--config", name]
    # The user's settings, then those of a certificate.
    command += overrides
    command += [
        f"seed={seed}",
        f"steps={UPDATES}",
        f"run_dir={place}",
        f"diagnosis.updates={UPDATES}",
        "video_every=0",
        "evaluation=null",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        exit_with_error(f"seed {seed} failed: {done.stderr.strip()[-600:]}")


def certificate(
    configs: Sequence[str],
    overrides: Sequence[str],
    runs: Sequence[Evidence],
    made_from: Sequence[str],
) -> dict[str, Any]:
    """The entry of a recipe from the evidence of its runs; a band is [low, high] by update.

    made_from  words of the command line that name the runs
    """
    settings = plain(load(GrpoRun, configs, overrides))
    remembered = {key: value_at(settings, key) for key in REMEMBERED}

    # A band for every quantity that all runs have.
    bands = {}
    for name in (*FACTORS, *MARGINS):
        columns = [values_of(evidence, name) for evidence in runs]
        rows = bands_of(columns, name)
        if rows:
            bands[name] = rows

    # The command that makes it again.
    words = [f"--config {name}" for name in configs]
    words += [*made_from, *overrides]
    return {
        "recipe": " + ".join([*configs, *overrides]),
        "made_by": f"python launch/diagnosis/certificate.py {' '.join(words)}",
        "runs": len(runs),
        "settings": _nested(remembered),
        "rewards": rewards_of(runs),
        "bands": bands,
        "round_trip_limit": round_trip_limit(runs),
        "seconds_per_step": _mean(runs, "seconds/step"),
        "peak_gb": _mean(runs, "memory/peak_gb"),
    }


def bands_of(columns: Sequence[Mapping[int, float]], name: str) -> list[list[float]]:
    """The band of each update over the runs; [] where some run lacks the quantity."""
    rows = []
    for step in range(UPDATES):
        values = [column[step] for column in columns if step in column]
        if not values or len(values) < len(columns):
            return []
        # Three digits are enough for a margin.
        limits = band(name, min(values), max(values))
        rows.append([float(f"{limit:.3g}") for limit in limits])
    return rows


def rewards_of(runs: Sequence[Evidence]) -> dict[str, Any]:
    """The rewards of the runs by kind; where measured, whether one read the prompt.

    It did if some score changed with another prompt.
    """
    found: dict[str, Any] = {}
    for evidence in runs:
        for name, entry in evidence.rewards.items():
            kind = identity(name, entry)
            key = f"rewards/{name}/wrong_prompt"
            fell = evidence.measured(f"{key}/fell")
            changed = sum(fell) + sum(evidence.measured(f"{key}/rose"))
            before = found.setdefault(kind, {})
            # Runs of others may have measured nothing.
            if fell:
                read = before.get("reads_prompt", False) or changed > 0
                before["reads_prompt"] = read
    return found


def round_trip_limit(runs: Sequence[Evidence]) -> float:
    """Twice the largest relative error of decoding and encoding; 0.8 without runs."""
    values = []
    for evidence in runs:
        values += evidence.measured("vae/round_trip")
    return round(2 * max(values), 3) if values else 0.8


def _mean(runs: Sequence[Evidence], name: str) -> float | None:
    values = []
    for evidence in runs:
        # The first step warms up.
        values += evidence.column(name)[1:]
    if not values:
        return None
    return round(sum(values) / len(values), 3)


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        # Down to the section of the key.
        *folders, last = key.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return nested


if __name__ == "__main__":
    main()
