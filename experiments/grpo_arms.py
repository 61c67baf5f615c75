"""The arms of `experiments/reproduce_grpo.py`: one difference each from the recipe, what an update costs, the commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import load
from experiments.runner import CommandStep
from launch.planning.forwards import samples_per_rollout, samples_per_update
from launch.schemas.training import GrpoRun

CONFIGS = Path("configs/shapes")
SISTERS = Path("configs/sisters")
COMMAND = "python experiments/reproduce_grpo.py"
BASE = "longcat"


@dataclass(frozen=True)
class GrpoArm:
    """A way to align.

    extra    overrides of the recipe
    sister   yaml of configs/sisters between the recipe and ``extra``
    updates  True makes as many updates as the recipe does; else as many as cost the same
    """

    title: str
    extra: tuple[str, ...] = ()
    sister: str | None = None
    updates: bool = False


# a sister brings its algorithm; steps, members, adapter and rate stay the recipe's, so that nothing else differs
_SAMPLER = "generator.sampler."
SAME = (
    f"{_SAMPLER}num_steps=8",
    "grpo.group_size=8",
    "optimizer.lr=2e-3",
    "generator.lora.rank=32",
)
SAME += ("generator.lora.alpha=32", "generator.lora.targets=[to_q,to_k,to_v]")
LATE = f"{_SAMPLER}stochastic_first=1"
ARMS = {
    BASE: GrpoArm("Longcat-GRPO, the recipe"),
    "no_reweight": GrpoArm("without reweighting", ("grpo.reweight=none",)),
    "own_spread": GrpoArm("each group's own spread", ("grpo.scale=group",)),
    "no_spread": GrpoArm("no spread at all", ("grpo.scale=none",)),
    "late": GrpoArm("the first step never stochastic", (LATE,)),
    "untruncated": GrpoArm(
        "the same, noise without a ceiling", (LATE, f"{_SAMPLER}max_std=null")
    ),
    "no_kl": GrpoArm("without KL", ("grpo.kl_weight=0",)),
    "members_4": GrpoArm(
        "G = 4, twice the prompts", ("grpo.group_size=4", "prompts_per_step=32")
    ),
    "members_16": GrpoArm(
        "G = 16, half the prompts", ("grpo.group_size=16", "prompts_per_step=8")
    ),
    "flow_grpo": GrpoArm(
        "Flow-GRPO", (*SAME, f"{_SAMPLER}stochastic_range=8"), "flow_grpo"
    ),
    "mixgrpo": GrpoArm(
        "MixGRPO, a window of 4",
        (*SAME, f"{_SAMPLER}stochastic_range=8", f"{_SAMPLER}window_every=4"),
        "mixgrpo",
    ),
    "flash_grpo": GrpoArm(
        "Flash-GRPO", (*SAME, f"{_SAMPLER}stochastic_range=4"), "flash_grpo"
    ),
    "flow_cps": GrpoArm("Flow-CPS kernel", (), "flow_cps"),
    "tail_euler": GrpoArm(
        "tail of 3 Euler steps", (f"{_SAMPLER}tail_steps=3",), updates=True
    ),
    "tail_ab2": GrpoArm(
        "tail of 3 second-order steps",
        (f"{_SAMPLER}tail_steps=3", f"{_SAMPLER}tail_solver=ab2"),
        updates=True,
    ),
    "tail_cache": GrpoArm(
        "every other tail step from cached features",
        (f"{_SAMPLER}tail_cache=2",),
        updates=True,
    ),
}


def cost_of_update(cfg: GrpoRun) -> float:
    """DiT samples of one update, a backward counted as two: rollouts, then 3 with gradient and 1 for the reference of
    every latent that a stochastic step starts from.
    """
    how, members = cfg.generator.sampler, cfg.grpo.group_size
    scale = 1 if how.guidance_scale == 1 else 2
    update = samples_per_update(cfg) * scale * (3 + (cfg.grpo.kl_weight > 0))
    return cfg.prompts_per_step * (samples_per_rollout(how, members) + update)


@dataclass(frozen=True)
class GrpoArmRun:
    """One arm under one seed; arm "base" is the generator before any training."""

    seed: int
    arm: str

    def folder(self, root: Path) -> Path:
        return root / f"seed{self.seed}" / self.arm


def configs_of(arm: GrpoArm) -> list[Path]:
    """Recipe and sister, as --config takes them."""
    return [
        CONFIGS / "grpo_oracle.yaml",
        *([SISTERS / f"{arm.sister}.yaml"] if arm.sister else []),
    ]


def updates_of(arm: GrpoArm, updates: int) -> int:
    """How many updates the arm makes for what ``updates`` of the recipe cost, at least one."""
    if arm.updates:
        return updates
    costs = [
        cost_of_update(load(GrpoRun, configs_of(one), one.extra))
        for one in (ARMS[BASE], arm)
    ]
    return max(1, round(updates * costs[0] / costs[1]))


def steps_of(
    run: GrpoArmRun, root: Path, *, updates: int, prompts: int
) -> list[CommandStep]:
    """Train, then judge on held-out prompts."""
    folder, steps = run.folder(root), []
    evaluated = [
        "generator",
        "--config",
        str(CONFIGS / "evaluate_oracle.yaml"),
        f"seed={run.seed}",
    ]
    evaluated += [f"out={folder / 'eval'}", f"limit={prompts}"]
    if run.arm != "base":
        arm = ARMS[run.arm]
        count = updates_of(arm, updates)
        words = [word for path in configs_of(arm) for word in ("--config", str(path))]
        words += [
            f"run_dir={folder}",
            f"seed={run.seed}",
            f"steps={count}",
            f"evaluation.every={max(1, count // 4)}",
        ]
        words += [f"evaluation.limit={min(48, prompts)}"]
        done = folder / "final" / "pytorch_lora_weights.safetensors"
        steps.append(CommandStep(f"train {run}", "grpo.py", [*words, *arm.extra], done))
        evaluated.append(f"adapter={folder / 'final'}")
    steps.append(
        CommandStep(
            f"judge {run}", "evaluate.py", evaluated, folder / "eval" / "summary.json"
        )
    )
    return steps
