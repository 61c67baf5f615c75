"""What a run that trains a generator leaves: checkpoints to go on from, and what was trained, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common import distributed
from common.log import say
from engine.state import save_engine, save_step
from engine.zero3 import whole_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor, nn

    from engine.ema import Ema
    from engine.state import CheckpointSettings


class TrainedGenerator(Protocol):
    """What is saved of a generator: its module's trained weights."""

    module: nn.Module

    def save_trained(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained weights for people, and return the file."""
        ...


def save(
    cfg: CheckpointSettings,
    generator: TrainedGenerator,
    engine: DeepSpeedEngine,
    ema: Ema | None,
    *,
    step: int,
    state: Mapping[str, Any] | None = None,
) -> None:
    """checkpoints/step-N: trained/ for people, engine.safetensors and ``state`` to go on from. All ranks call it."""

    def write(folder: Path) -> None:
        save_engine(engine, folder)
        if ema is not None:
            ema.save(folder)
        weights = whole_state(generator.module, trained_only=True)
        if distributed.is_main():
            generator.save_trained(folder / "trained", weights)

    save_step(cfg, step, write, state=state)


def export(generator: TrainedGenerator, ema: Ema | None, run_dir: Path) -> None:
    """final/, and final_ema/ where there is an average. All ranks call it."""
    weights = whole_state(generator.module, trained_only=True)
    if distributed.is_main():
        say(f"done: {generator.save_trained(run_dir / 'final', weights)}")
        if ema is not None:
            say(
                f"its average: {generator.save_trained(run_dir / 'final_ema', ema.state())}"
            )
