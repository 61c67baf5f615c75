"""Run the whole way on a CPU, from preference data to a tuned generator: `make demo`.

Every step is the command a user would type, and is printed. A step that has finished is not
repeated when the demo is started again. Results: ``report.html`` and ``summary.json`` in the run
folder. At most 12 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from experiments.runner import ROOT, CommandStep, PeakMemory, run_step

CONFIGS = Path("configs/shapes")
PAIR_PROMPTS, PAIR_EPOCHS = (
    350,
    8,
)  # of Flow-DPO here: half of the prompts, twice as often


def plan(run: Path, seed: int) -> list[CommandStep]:
    """The demo, in order."""
    data, judge, grpo, pairs, dpo = (
        run / name for name in ("data", "descore", "grpo", "pairs", "dpo")
    )
    adapter = Path("final", "pytorch_lora_weights.safetensors")
    judged = f"rewards.descore.checkpoint={judge / 'final'}"

    def of(config: str, *words: str) -> list[str]:
        return ["--config", str(CONFIGS / f"{config}.yaml"), *words]

    def evaluated(name: str, *words: str) -> list[str]:
        return [
            "generator",
            *of("evaluate", f"seed={seed}", judged, *words, f"out={run / name}"),
        ]

    return [
        CommandStep(
            "preference data: two videos a prompt, a preference and chains of thought",
            "toy/make_pairs.py",
            ["--out", str(data), "--seed", str(seed)],
            data / "done.json",
            launcher=False,
        ),
        CommandStep(
            "DeScore, stage 1: cold start",
            "launch/cold_start.py",
            of(
                "cold_start",
                f"run_dir={judge}",
                f"seed={seed}",
                f"data.train={data / 'train.csv'}",
                f"data.heldout={data / 'heldout.csv'}",
            ),
            judge / "final" / "descore.json",
        ),
        CommandStep(
            "DeScore on pairs it has never seen",
            "launch/evaluate.py",
            [
                "rm",
                *of(
                    "evaluate_rm",
                    f"checkpoint={judge / 'final'}",
                    f"pairs={data / 'heldout.csv'}",
                    f"out={run / 'eval_rm'}",
                ),
            ],
            run / "eval_rm" / "summary.json",
        ),
        CommandStep(
            "Longcat-GRPO: Wan learns from DeScore alone; the oracle watches with weight 0",
            "launch/grpo.py",
            of("grpo", f"run_dir={grpo}", f"seed={seed}", judged),
            grpo / adapter,
        ),
        CommandStep(
            "pairs: eight videos a prompt, judged by DeScore; the best and the worst of each",
            "launch/pairs.py",
            of(
                "pairs", f"out={pairs}", f"seed={seed}", f"limit={PAIR_PROMPTS}", judged
            ),
            pairs / "manifest.json",
        ),
        CommandStep(
            "Flow-DPO: Wan learns from these pairs alone",
            "launch/dpo.py",
            of(
                "dpo",
                f"run_dir={dpo}",
                f"seed={seed}",
                f"pairs={pairs}",
                f"dpo.epochs={PAIR_EPOCHS}",
            ),
            dpo / adapter,
        ),
        *(
            CommandStep(
                title,
                "launch/evaluate.py",
                evaluated(name, *words),
                run / name / "summary.json",
            )
            for title, name, words in (
                ("the base generator on held-out prompts", "eval_base", ()),
                (
                    "tuned by GRPO, the same prompts and seeds",
                    "eval_tuned",
                    (f"adapter={grpo / 'final'}",),
                ),
                (
                    "tuned by Flow-DPO, the same prompts and seeds",
                    "eval_dpo",
                    (f"adapter={dpo / 'final'}",),
                ),
            )
        ),
    ]


def summarise(
    run: Path, seconds: dict[str, float], peak_bytes: int
) -> dict[str, object]:
    """The demo's claims, read from the files its steps wrote."""

    def read(name: str) -> dict[str, dict[str, object]]:
        return json.loads(
            (ROOT / run / name / "summary.json").read_text(encoding="utf-8")
        )

    rm, base, tuned, dpo = (
        read("eval_rm"),
        read("eval_base"),
        read("eval_tuned"),
        read("eval_dpo"),
    )
    parts = sorted(key for key in base if key.startswith("shapes."))
    return {
        "rm": {"heldout_accuracy": rm["without_ties"]},
        "oracle": {
            "base": base["shapes"],
            "tuned": tuned["shapes"],
            "dpo": dpo["shapes"],
        },
        "descore": {
            "base": base["descore"],
            "tuned": tuned["descore"],
            "dpo": dpo["descore"],
        },
        "sub_dimensions": {
            key.partition(".")[2]: {
                "base": base[key],
                "tuned": tuned[key],
                "dpo": dpo[key],
            }
            for key in parts
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_gb": round(peak_bytes / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes a training step uses",
    )
    args = parser.parse_args()

    folder = ROOT / args.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    timings = folder / "seconds.json"
    seconds: dict[str, float] = (
        json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else {}
    )
    memory = PeakMemory()
    memory.peak = int(seconds.pop("peak_bytes", 0))
    steps = plan(args.run_dir, args.seed)
    for number, step in enumerate(steps, start=1):
        print(f"\n== {number}/{len(steps)}  {step.title}", flush=True)
        if (ROOT / step.done).exists():
            print(f"   done before ({step.done})", flush=True)
            continue
        name = f"{number} {Path(step.script).name}"
        try:
            seconds[name] = run_step(step, args.ranks, memory=memory)
        except RuntimeError as error:
            sys.exit(f"demo: {error}\nfix it and start the demo again, it goes on here")
        timings.write_text(
            json.dumps({**seconds, "peak_bytes": memory.peak}) + "\n", encoding="utf-8"
        )
        print(f"   {seconds[f'{number} {Path(step.script).name}']:.0f} s", flush=True)

    summary = summarise(args.run_dir, seconds, memory.peak)
    summary["seconds"]["all"] = round(sum(seconds.values()), 1)
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=1) + "\n", encoding="utf-8"
    )
    run_report(args.run_dir)
    for name, value in {
        **summary["rm"],
        **{f"oracle.{k}": v for k, v in summary["oracle"].items()},
    }.items():
        low, high = value["ci95"]
        print(
            f"{name:>18}  {value['mean']:.3f}  95 % [{low:.3f}, {high:.3f}]  n = {value['n']}"
        )
    print(
        f"{'all steps':>18}  {sum(seconds.values()) / 60:.1f} minutes, peak memory {summary['peak_memory_gb']} GB"
    )
    print(f"look at {args.run_dir / 'report.html'}")


def run_report(run: Path) -> None:
    """One HTML file about everything in the run folder."""
    subprocess.run(
        [
            sys.executable,
            "launch/report.py",
            str(run),
            "--out",
            str(run / "report.html"),
        ],
        cwd=ROOT,
        check=True,
    )


if __name__ == "__main__":
    main()
