"""The judges that `experiments/reproduce_rm.py` makes, and the commands that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.runner import CommandStep

CONFIGS = Path("configs/shapes")
COMMAND = "python experiments/reproduce_rm.py"
TESTS = ("indomain", "combinations", "renderer", "wan", "spoilt")


@dataclass(frozen=True)
class Method:
    """A way to make a judge.

    script, config  what trains it; None is the base Qwen3-VL as it is
    after           the method whose judge it starts from, on the same data
    extra           overrides of the yaml
    judging         keyword arguments of `rm.scorer.DeScoreScorer.load`
    """

    title: str
    script: str | None
    config: str = ""
    after: str | None = None
    extra: tuple[str, ...] = ()
    judging: str = "{}"


PASSES = (
    "cold_start.epochs=4",
    "cold_start.pairs_per_step=16",
    "cold_start.micro_batch=16",
)
# half the demo's rates: nothing in stage 1 holds the chains of thought in place, see docs/results/reproduce_rm.md
STAGE1 = (*PASSES, "lr.llm=2e-4", "lr.vision=3e-5", "lr.merger=3e-5")
RL = ("dual_rl.pairs_per_step=16", "dual_rl.pairs_per_update=16")
METHODS = {
    "base": Method(
        "Qwen3-VL as it is, its stated score", None, judging="{value: overall}"
    ),
    "discriminative": Method(
        "discriminative (always masked)",
        "cold_start.py",
        "discriminative.yaml",
        extra=PASSES,
        judging="{chains: 0}",
    ),
    "generative": Method(
        "generative (GRPO on the stated score)",
        "dual_rl.py",
        "generative.yaml",
        extra=RL,
        judging="{value: overall}",
    ),
    "stage1_p0": Method(
        "DeScore stage 1, p = 0",
        "cold_start.py",
        "cold_start.yaml",
        extra=(*STAGE1, "cold_start.masking.probability=0.0"),
    ),
    "stage1": Method(
        "DeScore stage 1, p = 0.5",
        "cold_start.py",
        "cold_start.yaml",
        extra=(*STAGE1, "cold_start.masking.probability=0.5"),
    ),
    "stage1_at_once": Method(
        "... the same, scoring at once", None, after="stage1", judging="{chains: 0}"
    ),
    "descore": Method(
        "DeScore, both stages, p = 0.5",
        "dual_rl.py",
        "dual_rl.yaml",
        after="stage1",
        extra=RL,
    ),
    "descore_p0": Method(
        "DeScore, both stages, p = 0",
        "dual_rl.py",
        "dual_rl.yaml",
        after="stage1_p0",
        extra=RL,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One judge: trained by a method under a seed on the first ``size`` pairs. The base has size 0."""

    seed: int
    size: int
    method: str

    def folder(self, run: Path) -> Path:
        return run / f"seed{self.seed}" / f"{self.size}_{self.method}"

    def judge(self, run: Path) -> Path:
        """The folder of its weights."""
        method = METHODS[self.method]
        if method.script is None:
            before = method.after
            return (
                run / "base"
                if before is None
                else Cell(self.seed, self.size, before).judge(run)
            )
        return self.folder(run) / "final"


def chains(seed: int, sizes: Sequence[int]) -> list[list[Cell]]:
    """Cells that follow each other: each starts from what those before it in its list left."""
    found = [[Cell(seed, 0, "base")]]
    for size in sizes:
        found.append(
            [Cell(seed, size, name) for name in ("stage1", "descore", "stage1_at_once")]
        )
        found.append([Cell(seed, size, name) for name in ("stage1_p0", "descore_p0")])
        found += [[Cell(seed, size, name)] for name in ("generative", "discriminative")]
    return found


def steps_of(
    cell: Cell, run: Path, *, rl_steps: int, more: Sequence[str] = ()
) -> list[CommandStep]:
    """Train it, then let it judge all tests."""
    method, folder, data = (
        METHODS[cell.method],
        cell.folder(run),
        run / f"seed{cell.seed}" / "data",
    )
    steps = []
    if method.script is not None:
        words = [
            "--config",
            str(CONFIGS / method.config),
            f"run_dir={folder}",
            f"seed={cell.seed}",
        ]
        words += [
            f"data.train={data / 'filmed.csv'}",
            "data.heldout=null",
            f"data.limit={cell.size}",
            "eval_every=0",
        ]
        if method.script == "dual_rl.py":
            words += [f"dual_rl.steps={rl_steps}"]
        if method.after is not None:
            words += [
                f"checkpoint={Cell(cell.seed, cell.size, method.after).judge(run)}"
            ]
        steps.append(
            CommandStep(
                f"train {cell}",
                method.script,
                [*words, *method.extra, *more],
                folder / "final" / "descore.json",
            )
        )
    out = folder / "tests"
    words = [
        "rm",
        "--config",
        str(CONFIGS / "evaluate_rm.yaml"),
        f"checkpoint={cell.judge(run)}",
    ]
    words += [
        f"pairs={data / 'tests.csv'}",
        f"out={out}",
        f"options={method.judging}",
        "batch=32",
        "resamples=200",
    ]
    steps.append(
        CommandStep(f"judge {cell}", "evaluate.py", words, out / "summary.json")
    )
    return steps
