"""Send a run's metrics and videos to wandb, and its metrics to TensorBoard.

A tracker that fails is reported once and left out: a refused key, a dead network or a full disk
must not stop training.
"""

from __future__ import annotations

import importlib
import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import safe_yaml
from common.files import read_json, replace_text
from common.run_record import SETTINGS

if TYPE_CHECKING:
    from common.config import WandbConfig

WANDB_FILE = "wandb.json"


class WandbTracker:
    """A wandb run for a run folder; a resumed run goes on with the id in wandb.json."""

    def __init__(
        self,
        run_dir: Path,
        start: int,
        cfg: WandbConfig,
    ) -> None:
        # A run that starts from its first step is a new wandb run.
        self.wandb: Any = importlib.import_module("wandb")
        id_file = run_dir / WANDB_FILE
        if start == 0 or not id_file.is_file():
            content = {"id": secrets.token_hex(8)}
            replace_text(id_file, json.dumps(content) + "\n")

        # The resolved config, in which secrets are masked.
        config = None
        settings = run_dir / SETTINGS
        if settings.is_file():
            text = settings.read_text(encoding="utf-8")
            config = safe_yaml.parse(text).value
        self.wandb.init(
            dir=str(run_dir),
            mode=cfg.mode,
            project=cfg.project,
            name=cfg.name,
            resume="allow",
            config=config,
            **read_json(id_file),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.wandb.log(dict(values), step=step)

    def videos(
        self,
        step: int,
        files: Sequence[Path],
        captions: Sequence[str],
    ) -> None:
        """Upload all videos of a step as a single entry."""
        videos = [
            self.wandb.Video(str(file), caption=caption, format="mp4")
            for file, caption in zip(files, captions, strict=True)
        ]
        self.wandb.log({"samples": videos}, step=step)

    def close(self) -> None:
        self.wandb.finish()


class TensorboardTracker:
    """Scalars in run_dir/tensorboard; a resumed run overwrites what followed its checkpoint."""

    def __init__(self, run_dir: Path, start: int) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        folder = str(run_dir / "tensorboard")
        # purge_step hides what a killed run wrote after its checkpoint.
        self.writer = module.SummaryWriter(folder, purge_step=start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # TensorBoard takes a number at a time.
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def videos(self, *_: object) -> None:
        """Do nothing, since TensorBoard would need decoded videos."""

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """The running trackers by name; ``say`` reports those that fail or are not installed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[str, WandbTracker | TensorboardTracker] = {}

    def start(
        self,
        name: str,
        tracker: Callable[..., Any],
        *arguments: Any,
    ) -> None:
        """Start a tracker, unless its package is missing or it fails."""
        try:
            self.running[name] = tracker(*arguments)
        except _errors() as error:
            self.say(f"{name} is not used, the run goes on without it: {error}")

    def call(self, action: str, *arguments: Any) -> None:
        """Call the method ``action`` of every tracker, and drop a tracker that fails."""
        for name, tracker in list(self.running.items()):
            try:
                # A tracker may fail at any call, for example when the disk is full.
                getattr(tracker, action)(*arguments)
            except _errors() as error:
                self.say(f"{name} {action} failed, the run goes on without it: {error}")
                del self.running[name]


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors of imports, files and networks, and wandb's if it is there."""
    errors = (ImportError, OSError, RuntimeError, ValueError)
    # wandb's errors derive from none of these.
    wandb = sys.modules.get("wandb")
    return errors if wandb is None else (*errors, wandb.errors.Error)
