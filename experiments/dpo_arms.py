"""The arms of `experiments/reproduce_dpo.py`: what is prepared, what learns from it, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import load
from experiments.grpo_arms import cost_of_update
from experiments.runner import CommandStep, Job
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import GrpoRun

CONFIGS = Path("configs/shapes")


@dataclass(frozen=True)
class DpoArm:
    """A way to learn from the pairs: overrides of configs/shapes/dpo.yaml."""

    title: str
    extra: tuple[str, ...] = ()


ARMS = {
    "sft": DpoArm("fine-tuning on the winners", ("dpo.method=sft",)),
    "rwr": DpoArm("Flow-RWR", ("dpo.method=rwr",)),
    "dpo": DpoArm("Flow-DPO, constant beta"),
    "dpo_quadratic": DpoArm(
        "Flow-DPO, beta (1 - t)^2", ("dpo.beta_schedule=quadratic",)
    ),
}
TITLES = {
    "base": "the generator as it is",
    **{name: arm.title for name, arm in ARMS.items()},
    "grpo": "Longcat-GRPO",
}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    judge_pairs  preference pairs that DeScore learns from
    prompts      that eight videos each are made of
    epochs       on the pairs, times those of configs/shapes/dpo.yaml
    heldout      prompts that the oracle judges
    """

    judge_pairs: int
    prompts: int
    epochs: float
    heldout: int


def forwards_of_pairs(size: Size) -> float:
    """DiT samples of filming all candidates."""
    pairs = load(PairsRun, CONFIGS / "pairs.yaml")
    scale = 1 if pairs.generator.sampler.guidance_scale == 1 else 2
    return (
        size.prompts
        * pairs.pairs.candidates
        * pairs.generator.sampler.num_steps
        * scale
    )


def epochs_of(size: Size) -> float:
    """Epochs of training on the pairs."""
    return load(DpoRun, CONFIGS / "dpo.yaml").dpo.epochs * size.epochs


def updates_of_grpo(size: Size) -> int:
    """Updates of configs/shapes/grpo.yaml for what the pairs and Flow-DPO on them cost, a backward counted as two, were
    every prompt a pair: winner and loser, once with gradient and once for the reference.
    """
    everything = forwards_of_pairs(size) + size.prompts * epochs_of(size) * 2 * (3 + 1)
    return max(
        1, round(everything / cost_of_update(load(GrpoRun, CONFIGS / "grpo.yaml")))
    )


def prepare(seed: int, root: Path, size: Size) -> Job:
    """DeScore, and the pairs it makes."""
    folder = root / f"seed{seed}"
    data, judge, pairs = folder / "data", folder / "descore", folder / "pairs"
    split = ["--pairs", f"train={size.judge_pairs}", "heldout=8", "--workers", "1"]
    trained = [
        "--config",
        str(CONFIGS / "cold_start.yaml"),
        f"run_dir={judge}",
        f"seed={seed}",
        "eval_every=0",
    ]
    trained += [f"data.train={data / 'train.csv'}", "data.heldout=null"]
    filmed = [
        "--config",
        str(CONFIGS / "pairs.yaml"),
        f"out={pairs}",
        f"seed={seed}",
        f"limit={size.prompts}",
    ]
    filmed += [f"rewards.descore.checkpoint={judge / 'final'}"]
    steps = [
        CommandStep(
            "data",
            "make_shapes.py",
            ["--out", str(data), "--seed", str(seed), *split],
            data / "done.json",
        ),
        CommandStep(
            "descore", "cold_start.py", trained, judge / "final" / "descore.json"
        ),
        CommandStep("pairs", "pairs.py", filmed, pairs / "manifest.json"),
    ]
    return Job(folder, steps)


def learn(seed: int, arm: str, root: Path, size: Size) -> Job:
    """One arm under one seed: train, then let the oracle judge."""
    folder = root / f"seed{seed}" / arm
    final, steps = folder / "final" / "pytorch_lora_weights.safetensors", []
    judged = [
        "generator",
        "--config",
        str(CONFIGS / "evaluate_oracle.yaml"),
        f"out={folder / 'eval'}",
        f"seed={seed}",
    ]
    judged += [f"limit={size.heldout}"]
    if arm in ARMS:
        words = [
            "--config",
            str(CONFIGS / "dpo.yaml"),
            f"run_dir={folder}",
            f"seed={seed}",
        ]
        words += [f"dpo.epochs={epochs_of(size):g}"]
        words += [f"pairs={root / f'seed{seed}' / 'pairs'}", *ARMS[arm].extra]
        steps.append(CommandStep(f"train {arm}", "dpo.py", words, final))
    elif arm == "grpo":
        words = [
            "--config",
            str(CONFIGS / "grpo.yaml"),
            f"run_dir={folder}",
            f"seed={seed}",
            "video_every=0",
        ]
        words += [
            f"rewards.descore.checkpoint={root / f'seed{seed}' / 'descore' / 'final'}"
        ]
        steps.append(
            CommandStep(
                "train grpo",
                "grpo.py",
                [*words, f"steps={updates_of_grpo(size)}"],
                final,
            )
        )
    if steps:
        judged.append(f"adapter={folder / 'final'}")
    steps.append(
        CommandStep("judge", "evaluate.py", judged, folder / "eval" / "summary.json")
    )
    return Job(folder, steps)
