"""A run's metrics and videos in wandb or TensorBoard, beside metrics.jsonl. What fails there is said once and ends it:
a refused key, a dead network or a full disk must not stop training.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from common import safe_yaml
from common.files import replace_text
from common.run_record import SETTINGS

if TYPE_CHECKING:
    from common.config import WandbConfig

IDENTITY = "wandb.json"


class Tracker(Protocol):
    """Where numbers and videos go; any of these may raise what ``errors`` names."""

    name: str
    errors: tuple[type[Exception], ...]

    def start(self) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def videos(
        self, step: int, files: Sequence[Path], captions: Sequence[str]
    ) -> None: ...
    def finish(self) -> None: ...


class WandbTracker:
    """One wandb run for one run folder, however often that is gone on with: its id is in wandb.json.

    fresh  the run starts from its first step, under a new id
    """

    name = "wandb"

    def __init__(self, cfg: WandbConfig, run_dir: Path, *, fresh: bool) -> None:
        self.cfg, self.run_dir, self.fresh = cfg, run_dir, fresh
        self._wandb: ModuleType = importlib.import_module("wandb")
        self.errors = (self._wandb.errors.Error, OSError, RuntimeError, ValueError)

    def start(self) -> None:
        """With the resolved config, secrets masked, as config.yaml has it."""
        file, settings = self.run_dir / IDENTITY, self.run_dir / SETTINGS
        if self.fresh or not file.is_file():
            replace_text(file, json.dumps({"id": secrets.token_hex(8)}) + "\n")
        about = (
            safe_yaml.parse(settings.read_text(encoding="utf-8")).value
            if settings.is_file()
            else None
        )
        self._wandb.init(
            dir=str(self.run_dir),
            mode=self.cfg.mode,
            project=self.cfg.project,
            name=self.cfg.name,
            id=json.loads(file.read_text(encoding="utf-8"))["id"],
            resume="allow",
            config=about,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._wandb.log(dict(values), step=step)

    def videos(self, step: int, files: Sequence[Path], captions: Sequence[str]) -> None:
        shown = [
            self._wandb.Video(str(file), caption=caption, format="mp4")
            for file, caption in zip(files, captions, strict=True)
        ]
        self._wandb.log({"samples": shown}, step=step)

    def finish(self) -> None:
        self._wandb.finish()


class TensorboardTracker:
    """Scalars in run_dir/tensorboard; a run that is gone on with writes over what came after its checkpoint."""

    name = "tensorboard"
    errors = (OSError, RuntimeError, ValueError)

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.folder, self.step = run_dir / "tensorboard", step
        self._module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer: Any = None

    def start(self) -> None:
        self._writer = self._module.SummaryWriter(
            str(self.folder), purge_step=self.step
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def videos(self, step: int, files: Sequence[Path], captions: Sequence[str]) -> None:
        """As links: TensorBoard would want them decoded."""
        lines = [
            f"`{file.name}` {caption}"
            for file, caption in zip(files, captions, strict=True)
        ]
        self._writer.add_text(
            "samples", "\n\n".join([str(files[0].parent.name), *lines]), step
        )

    def finish(self) -> None:
        self._writer.close()


class Trackers:
    """Those that were asked for and are there. ``say`` tells people what went wrong."""

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
        self._all("start", lambda one: one.start())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._all("log", lambda one: one.log(step, values))

    def videos(self, step: int, files: Sequence[Path], captions: Sequence[str]) -> None:
        self._all("videos", lambda one: one.videos(step, files, captions))

    def finish(self) -> None:
        self._all("finish", lambda one: one.finish())
        self.running = []

    def _all(self, what: str, call: Callable[[Tracker], None]) -> None:
        for one in list(self.running):
            try:
                call(one)
            except one.errors as error:
                self.say(
                    f"{one.name} {what} failed, the run goes on without it: {error}"
                )
                self.running.remove(one)
