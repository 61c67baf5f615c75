"""Write a generator's trained weights, as pipelines of other people load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.distributed import is_main
from common.log import say
from engine.zero3 import whole_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.ema import Ema


class TrainedGenerator(Protocol):
    """A generator whose module is trained."""

    module: nn.Module

    def save_trained(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained weights into a folder and return the file."""
        ...


def write_trained(generator: TrainedGenerator, folder: Path) -> None:
    """Write the trained weights into a folder. All ranks call it, rank 0 writes."""
    # Gathering is collective, writing is not.
    weights = whole_state(generator.module, trained_only=True)
    if is_main():
        generator.save_trained(folder, weights)


def export(generator: TrainedGenerator, ema: Ema | None, run_dir: Path) -> None:
    """Write final/, and final_ema/ where the weights are averaged. All ranks call it."""
    weights = whole_state(generator.module, trained_only=True)
    if not is_main():
        return
    say(f"done: {generator.save_trained(run_dir / 'final', weights)}")
    # Every rank holds the whole average: nothing is gathered.
    if ema is not None:
        file = generator.save_trained(run_dir / "final_ema", ema.state())
        say(f"average of the weights: {file}")
