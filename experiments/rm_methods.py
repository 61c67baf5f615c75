"""The reward models that `make reproduce-rm` compares, and the tests that they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The first is of the training domain.
TESTS = ("indomain", "combinations", "renderer", "wan", "spoilt")
OUTSIDE = TESTS[1:]
GROUPS = {
    "in domain": TESTS[:1],
    "out of domain": OUTSIDE,
}


@dataclass(frozen=True)
class Method:
    """A way to make a reward model.

    script   Training command; None uses the model of ``after``, or the base Qwen3-VL, unchanged.
    config   Name of its yaml.
    after    Method whose model training starts from, on the same data.
    extra    Overrides of the yaml.
    scoring  Keyword arguments of `rm.scorer.DeScoreScorer.load`.
    """

    title: str
    script: str | None = None
    config: str = ""
    after: str | None = None
    extra: tuple[str, ...] = ()
    scoring: str = "{}"


# Options of the scorer.
NO_COT = "{cots: 0}"
STATED = "{value: overall}"
COLD_START = "launch/cold_start.py"
DUAL_RL = "launch/dual_rl.py"
# Overrides of the yaml files.
PASSES = (
    "cold_start.epochs=4",
    "cold_start.pairs_per_step=16",
    "cold_start.micro_batch=16",
)
UNMASKED = (*PASSES, "cold_start.masking.probability=0.0")
MASKED = (*PASSES, "cold_start.masking.probability=0.5")
RL = ("dual_rl.pairs_per_step=16", "dual_rl.pairs_per_update=16")
# Methods by name; "descore" starts from "stage1".
METHODS = {
    "base": Method("base Qwen3-VL, its stated score", scoring=STATED),
    "discriminative": Method(
        "discriminative (always masked)",
        COLD_START,
        "discriminative",
        extra=PASSES,
        scoring=NO_COT,
    ),
    "generative": Method(
        "generative (GRPO on the stated score)",
        DUAL_RL,
        "generative",
        extra=RL,
        scoring=STATED,
    ),
    "stage1_p0": Method(
        "DeScore stage 1, p = 0", COLD_START, "cold_start", extra=UNMASKED
    ),
    "stage1": Method(
        "DeScore stage 1, p = 0.5", COLD_START, "cold_start", extra=MASKED
    ),
    "stage1_at_once": Method(
        "... the same, scoring without a CoT", after="stage1", scoring=NO_COT
    ),
    "descore": Method(
        "DeScore, both stages, p = 0.5", DUAL_RL, "dual_rl", "stage1", RL
    ),
    "descore_p0": Method(
        "DeScore, both stages, p = 0", DUAL_RL, "dual_rl", "stage1_p0", RL
    ),
}


@dataclass(frozen=True)
class Cell:
    """A method under a seed on the first ``size`` training pairs. The base has size 0."""

    seed: int
    size: int
    method: str

    def folder(self, run: Path) -> Path:
        """Run folder."""
        return run / f"seed{self.seed}" / f"{self.size}_{self.method}"

    def checkpoint(self, run: Path) -> Path:
        """Folder of its weights."""
        if METHODS[self.method].script is None:
            return self.start(run)
        return self.folder(run) / "final"

    def start(self, run: Path) -> Path:
        """Folder of the weights before training."""
        before = METHODS[self.method].after
        if before is None:
            return run / "base"
        return Cell(self.seed, self.size, before).checkpoint(run)
