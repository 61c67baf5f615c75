"""Send a run's metrics and videos to wandb or TensorBoard.

A tracker that fails is reported once and left out: a refused key, a dead network or a full disk
must not stop training.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import safe_yaml
from common.files import replace_text
from common.run_record import SETTINGS

if TYPE_CHECKING:
    from common.config import WandbConfig

IDENTITY = "wandb.json"


class WandbTracker:
    """A wandb run for a run folder; a resumed run goes on with the id in wandb.json.

    ``fresh`` is for a run that starts from its first step, under a new id.
    """

    name = "wandb"

    def __init__(
        self,
        cfg: WandbConfig,
        run_dir: Path,
        *,
        fresh: bool,
    ) -> None:
        self.cfg = cfg
        self.run_dir = run_dir
        self.fresh = fresh
        self.wandb: Any = importlib.import_module("wandb")
        self.errors = (self.wandb.errors.Error, OSError, RuntimeError, ValueError)

    def start(self) -> None:
        """Open the run, with the resolved config; config.yaml has its secrets masked."""
        # 1. The id: a resumed run is the same wandb run.
        identity = self.run_dir / IDENTITY
        if self.fresh or not identity.is_file():
            replace_text(identity, json.dumps({"id": secrets.token_hex(8)}) + "\n")

        # 2. The config.
        settings = self.run_dir / SETTINGS
        config = None
        if settings.is_file():
            config = safe_yaml.parse(settings.read_text(encoding="utf-8")).value
        self.wandb.init(
            dir=str(self.run_dir),
            mode=self.cfg.mode,
            project=self.cfg.project,
            name=self.cfg.name,
            id=json.loads(identity.read_text(encoding="utf-8"))["id"],
            resume="allow",
            config=config,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.wandb.log(dict(values), step=step)

    def videos(
        self,
        step: int,
        files: Sequence[Path],
        captions: Sequence[str],
    ) -> None:
        # one entry of the run with all videos of the step
        videos = []
        for file, caption in zip(files, captions, strict=True):
            video = self.wandb.Video(
                str(file),
                caption=caption,
                format="mp4",
            )
            videos.append(video)
        self.wandb.log({"samples": videos}, step=step)

    def finish(self) -> None:
        self.wandb.finish()


class TensorboardTracker:
    """Scalars in run_dir/tensorboard; a resumed run overwrites what followed its checkpoint."""

    name = "tensorboard"
    errors = (OSError, RuntimeError, ValueError)

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.folder = run_dir / "tensorboard"
        self.step = step
        self.module: Any = importlib.import_module("torch.utils.tensorboard")

    def start(self) -> None:
        folder = str(self.folder)
        # purge_step hides what a killed run wrote after its checkpoint
        self.writer = self.module.SummaryWriter(folder, purge_step=self.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def videos(
        self,
        step: int,
        files: Sequence[Path],
        captions: Sequence[str],
    ) -> None:
        """Name the files in a text, since TensorBoard would need decoded videos."""
        lines = [files[0].parent.name]
        for file, caption in zip(files, captions, strict=True):
            lines.append(f"`{file.name}` {caption}")
        self.writer.add_text("samples", "\n\n".join(lines), step)

    def finish(self) -> None:
        self.writer.close()


Tracker = WandbTracker | TensorboardTracker


class Trackers:
    """The running trackers; ``say`` reports a tracker that fails or is not installed."""

    def __init__(
        self, makers: Mapping[str, Callable[[], Tracker]], say: Callable[[str], None]
    ) -> None:
        self.say = say
        self.running: list[Tracker] = []
        for name, make in makers.items():
            try:
                self.running.append(make())
            except ImportError as error:
                say(f"{name} is not used, the run goes on without it: {error}")
        self.call("start")

    def call(self, action: str, *arguments: Any) -> None:
        """Call the method ``action`` of every tracker; a tracker that fails is dropped."""
        for tracker in list(self.running):
            try:
                getattr(tracker, action)(*arguments)
            except tracker.errors as error:
                # the rest of the run goes on
                self.say(
                    f"{tracker.name} {action} failed, the run goes on without it: {error}"
                )
                self.running.remove(tracker)
