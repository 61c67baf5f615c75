"""From configs to running things: console, rewards, generators and their training."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.rewards import build_rewards

if TYPE_CHECKING:
    from torch import nn

    from alignment.dpo import DpoLoop
    from alignment.grpo import GrpoLoop
    from common.types import Prompt
    from engine.config import TrainingRun
    from engine.ema import Ema
    from engine.old_policy import OldPolicy
    from engine.skip_nonfinite import SkipNonFinite
    from engine.trainer import TrainingTask
    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator
    from launch.schemas.pairs import DpoRun
    from launch.schemas.training import GrpoRun

__all__ = ["build_generator", "build_rewards", "quiet"]


def quiet() -> None:
    """Keep remarks of libraries off the console; their warnings and errors stay.

    Call it before the libraries are imported.
    """
    for name in ("transformers", "diffusers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # These libraries use names of each other that will be retired; users cannot change that.
    warnings.filterwarnings(
        "ignore",
        category=FutureWarning,
        module=r"torch\.distributed|diffusers\.|transformers\.",
    )

    import torch

    if not torch.accelerator.is_available():
        # Otherwise deepspeed finds out by itself, and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that share cores spin in barriers: small models ran 20 to 70 times slower.
            torch.set_num_threads(1)


def say_long_prompts(prompts: Sequence[Prompt], cfg: GeneratorConfig) -> None:
    """Print how many prompts the text encoder cuts off. Only rank 0 counts.

    Raises ValueError for prompts that the generator's folder does not take, with or without an
    image, and for an image that cannot be read.
    """
    from common.types import text_of

    # A generator of another class has its own limits.
    if cfg.target is None:
        check_images(prompts, cfg)
        say_long_texts([text_of(prompt) for prompt in prompts], cfg)


def say_long_texts(texts: Sequence[str], cfg: GeneratorConfig) -> None:
    """Print how many texts the text encoder cuts off. Only rank 0 counts."""
    from common.log import say
    from generator.prompts import describe_long_prompts

    # Every text is tokenized, which is work for one rank.
    if texts and os.environ.get("RANK", "0") == "0":
        remark = describe_long_prompts(texts, cfg)
        if remark:
            say(remark)


def check_images(prompts: Sequence[Prompt], cfg: GeneratorConfig) -> None:
    """Raise ValueError for prompts whose images are missing, not taken, or not readable.

    A generator on the hub is asked when it samples.
    """
    from common.types import ImagePrompt
    from generator.conditions import check_image_prompts, read_image
    from generator.family import Family

    images = {p.image for p in prompts if isinstance(p, ImagePrompt)}
    if Path(cfg.path).is_dir():
        family = Family.of(Path(cfg.path))
        check_image_prompts(prompts, family, cfg.path)
        if images and family.image == "first_frame" and cfg.context_parallel > 1:
            raise ValueError(
                f"generator.context_parallel={cfg.context_parallel} must be 1 for prompts with "
                f"images: {cfg.path} gives each token a time of its own"
            )
    # Reading all of them is work for one rank.
    if os.environ.get("RANK", "0") == "0":
        for image in sorted(images):
            read_image(image)


def check_image_objective(objective: str, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for prompts with images where GRPO trains on noised samples."""
    from common.types import ImagePrompt

    if objective != "policy" and any(isinstance(p, ImagePrompt) for p in prompts):
        raise ValueError(
            f"grpo.objective={objective} trains on noised samples of texts, and a prompt has an "
            "image: use objective=policy"
        )


def check_takes_images(
    cfg: GeneratorConfig, generator: object, prompts: Sequence[Prompt]
) -> None:
    """Raise ValueError for an image in a prompt where a class of another generator reads texts."""
    from common.types import ImagePrompt

    if cfg.target is None or getattr(generator, "takes_images", False):
        return
    for prompt in prompts:
        if isinstance(prompt, ImagePrompt):
            raise ValueError(
                f"generator.target={cfg.target} takes texts, and the prompt {prompt.text!r} has "
                "an image; a class that reads ImagePrompt says takes_images = True"
            )


def build_generator(
    cfg: GeneratorConfig, *, seed: int = 0, transformer_only: bool = False
) -> WanGenerator:
    """Load a generator on this rank's device; ``seed`` initialises what is new in it.

    With ``target`` in its config it is an object of another class (`generator.plugin`).
    """
    if cfg.target is not None:
        from generator.plugin import load_own

        return load_own(cfg, seed=seed)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from common.memory import default_device
    from generator.anyflow import load_generator

    # Every rank would print several bars.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    return load_generator(
        cfg, device=default_device(), seed=seed, transformer_only=transformer_only
    )


def check_family(
    run: GrpoRun | DpoRun, *, stochastic: bool = False, objective: str = "policy"
) -> None:
    """Raise ValueError for settings that the JSON files of the generator's folder rule out.

    objective   of GRPO; others than "policy" train on noised samples
    stochastic  the run has rollouts, whose stochastic steps are checked
    """
    from generator.experts import check_stochastic_steps, check_training
    from generator.family import Family
    from generator.wan_folder import find_wan

    # A generator of another class has its own limits.
    if run.generator.target is not None:
        return
    # Before weights are read.
    small = run.generator.scoring_decoder
    if small is not None and not (Path(small) / "config.json").is_file():
        raise FileNotFoundError(
            f"generator.scoring_decoder={small} is no model folder: it lacks config.json"
        )
    family = Family.of(find_wan(run.generator.path))
    check_training(run.generator, family, zero_stage=run.zero_stage)
    if family.boundary is not None and objective != "policy":
        raise ValueError(
            f"grpo.objective={objective} draws noise levels of both transformers of "
            f"{run.generator.path}, of which one is trained: use objective=policy"
        )
    # It predicts mean velocities between two times, and flow matching fits those of one.
    if family.flow_map and objective != "policy":
        raise ValueError(
            f"grpo.objective={objective} fits the velocity at one time, and {run.generator.path} "
            "is a flow map of few steps: use objective=policy"
        )
    if family.flow_map and getattr(run, "other_guidance", None) is not None:
        raise ValueError(
            f"evaluation.usual_guidance needs a velocity to guide, and {run.generator.path} is a "
            "flow map with its guidance in its weights: set it to null"
        )
    if stochastic:
        check_stochastic_steps(run.generator, family)


def trained_generator(cfg: GeneratorConfig, adapter: str | None) -> WanGenerator:
    """Build a generator, with the trained weights of a run's folder if one is given."""
    generator = build_generator(cfg)
    if adapter is not None:
        generator.load_trained(adapter)
    return generator


def generator_engine(
    run: GrpoRun | DpoRun, generator: WanGenerator, *, accumulation: int
) -> SkipNonFinite:
    """Build the engine that trains a generator."""
    from engine.deepspeed import build_engine
    from engine.skip_nonfinite import SkipNonFinite

    engine = build_engine(
        generator.module,
        optimizer=run.optimizer,
        zero_stage=run.zero_stage,
        accumulation=accumulation,
        overrides=run.deepspeed,
    )
    generator.sharded = run.zero_stage == 3
    return SkipNonFinite(
        engine,
        patience=run.max_nonfinite_updates,
        ranks_per_sample=run.generator.context_parallel,
    )


def size_of_training(run: TrainingRun, module: nn.Module) -> str:
    """Tell how many parameters of a module are trained."""
    from engine.zero3 import elements

    parameters = list(module.parameters())
    trained = elements(p for p in parameters if p.requires_grad)
    return (
        f"training {trained:,} of {elements(parameters):,} parameters, "
        f"ZeRO {run.zero_stage}"
    )


def generator_task(
    run: GrpoRun | DpoRun,
    loop: GrpoLoop | DpoLoop,
    ema: Ema | None,
    *,
    old: OldPolicy | None = None,
    **options: Any,
) -> TrainingTask:
    """Describe to the training loop how a generator is saved, exported and counted.

    old      is the policy that samples, where it is an average of the trained one
    options  are the other fields of `TrainingTask`
    """
    from engine.export import export, write_trained
    from engine.trainer import TrainingTask, do_nothing
    from generator.counter import ForwardCounter
    from launch.next_recipe import next_recipe
    from launch.planning.first_estimate import expect_step

    generator = loop.generator
    expect_step(run)
    report = f"python launch/report.py {run.run_dir} --out {run.run_dir}/report.html"
    # A generator of another class has a single module.
    modules = getattr(generator, "modules", [generator.module])
    counter = ForwardCounter(*modules, ranks_per_sample=run.generator.context_parallel)

    def write_extra(folder: Path) -> None:
        write_trained(generator, folder / "trained")
        if old is not None:
            old.save(folder)

    restore_more = options.pop("restore", do_nothing)

    def restore(folder: Path) -> None:
        restore_more(folder)
        if old is not None:
            old.load(folder)

    use = f"python launch/sample.py --config {next_recipe('sample')}"
    # A generator of another class than Wan is none of the recipe's.
    if run.generator.target is not None:
        use += f" generator.target={run.generator.target}"
        for key in ("path", "num_frames", "height", "width"):
            use += f" generator.{key}={getattr(run.generator, key)}"
    use += f" adapter={run.run_dir}/final out={run.run_dir}/videos"
    # Only GRPO evaluates on prompts.
    evaluation = getattr(run, "evaluation", None)
    if evaluation is not None:
        use += f" prompts={evaluation.prompts}"
    return TrainingTask(
        engine=loop.engine,
        next_command=f"{report}, then {use}",
        export=lambda: export(generator, ema, Path(run.run_dir)),
        ema=ema,
        take_forwards=counter.take,
        write_extra=write_extra,
        restore=restore,
        **options,
    )
