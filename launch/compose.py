"""From configs to running things. The only file that says how DeepSpeed is set up."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

from alignment.rewards import build_rewards
from engine.deepspeed import build_engine, ds_config

if TYPE_CHECKING:
    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator

__all__ = ["build_engine", "build_generator", "build_rewards", "ds_config", "quiet"]


def quiet() -> None:
    """Keep libraries' remarks off the console; their warnings and errors stay. Call it before they are imported."""
    for name in (
        "transformers",
        "diffusers",
        "deepspeed",
        "DeepSpeed",
        "torch.distributed",
    ):
        logging.getLogger(name).setLevel(
            logging.ERROR if name == "torch.distributed" else logging.WARNING
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # names that these libraries use of each other and are about to retire: nothing a user could act on
    warnings.filterwarnings(
        "ignore",
        category=FutureWarning,
        module=r"torch\.distributed|diffusers\.|transformers\.",
    )
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # deepspeed would find it out too, and warn
        if "OMP_NUM_THREADS" not in os.environ:
            # ranks that share cores spin in each other's barriers: small models ran 20 to 70 times slower with two
            torch.set_num_threads(1)


def build_generator(
    cfg: GeneratorConfig, *, seed: int = 0, transformer_only: bool = False
) -> WanGenerator:
    """The Wan generator of a config, on this rank's device; ``seed`` decides a new adapter's first values."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from generator.wan import WanGenerator

    diffusers_logging.disable_progress_bar()  # of its own loading, several lines a rank
    transformers_logging.disable_progress_bar()
    device = (
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if torch.cuda.is_available()
        else "cpu"
    )
    return WanGenerator.load(
        cfg, device=device, seed=seed, transformer_only=transformer_only
    )


def trained_generator(cfg: GeneratorConfig, adapter: str | None) -> WanGenerator:
    """`build_generator` with what a run has trained, where its folder is given. Errors as of both."""
    generator = build_generator(cfg)
    if adapter is not None:
        generator.load_trained(adapter)
    return generator
