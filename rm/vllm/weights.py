"""The folder that vLLM loads: a stock Qwen3-VL, whose weights come from a model or a checkpoint.

`TrainedWeights` hands over weights that change. All ranks of a node hold equal weights (ZeRO 0 to
2), so the node's first rank writes a single file, every rank's vLLM reads it, and it is deleted:
a node needs the room of the model once, and only while vLLM loads it. `CheckpointWeights` hands
over the files of a checkpoint folder as they are, so a frozen reward model writes nothing.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import save_tensors
from common.distributed import gather_objects, raise_on_all, rank
from common.weight_files import weight_files
from rm.config import VideoSettings
from rm.lora import ADAPTER_CONFIG, split_state
from rm.model import DeScore

WEIGHTS = "model.safetensors"


class TrainedWeights:
    """The weights that a model has now. All ranks make one together, and call it together.

    parent  Where the private folder is made; None is the system's temporary folder.
    """

    # Asleep, vLLM need not keep weights that are about to change.
    sleep_level = 2
    reload = True

    def __init__(self, model: DeScore, parent: str | None) -> None:
        self.model = model
        # Ranks of a node are numbered in a row, and the first of them writes.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.writes = local_rank == 0
        own = private_folder(self, parent) if self.writes else None
        self.folder = gather_objects(own)[rank() - local_rank]
        if self.writes:
            save_stock(model, self.folder)

    def hand_over(self, load: Callable[[], None]) -> None:
        """Write the weights, let the vLLM of every rank ``load`` them, and delete them.

        If a rank fails, all ranks raise its error.
        """
        on_all_ranks(self._write)
        on_all_ranks(load)
        if self.writes:
            (self.folder / WEIGHTS).unlink()

    def _write(self) -> None:
        if self.writes:
            save_tensors(self.folder / WEIGHTS, merged_weights(self.model))


class CheckpointWeights:
    """The weights in a checkpoint folder, which never change. Every rank is on its own.

    Raises ValueError for a folder whose adapter is not merged into its weights.
    """

    # Asleep, vLLM keeps the weights in the host's memory.
    sleep_level = 1
    reload = False

    def __init__(self, model: DeScore, checkpoint: Path, parent: str | None) -> None:
        if (checkpoint / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{checkpoint} holds an adapter beside its weights, and vLLM reads the weights "
                "alone: merge it with `python launch/export.py FOLDER --format merged --out OUT`"
            )
        self.folder = private_folder(self, parent)
        save_stock(model, self.folder)
        # One file, or several with their index.
        files = weight_files(checkpoint, WEIGHTS)
        files += checkpoint.glob(f"{WEIGHTS}.index.json")
        for file in files:
            (self.folder / file.name).symlink_to(file.resolve())

    def hand_over(self, load: Callable[[], None]) -> None:
        """Let vLLM load the files."""
        load()


def private_folder(owner: object, parent: str | None) -> Path:
    """Make a folder that only this user can read; it is deleted with its owner."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-", dir=parent))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def on_all_ranks(action: Callable[[], None]) -> None:
    """Do something on this rank; all ranks raise if it fails on any."""
    problem = None
    try:
        action()
    except (OSError, RuntimeError, ValueError) as error:
        problem = error
    raise_on_all(problem)


# ---------------------------------------------------------------------- a stock Qwen3-VL


def save_stock(model: DeScore, path: Path) -> None:
    """Write config, tokenizer and processor of a stock Qwen3-VL, all but the weights."""
    config = copy.deepcopy(model.backbone.config)
    config.architectures = [type(model.backbone).__name__]
    config.dtype = model.backbone.dtype
    config.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    save_processor(model.settings, path)


@torch.no_grad()
def merged_weights(model: DeScore) -> dict[str, Tensor]:
    """Return the backbone's weights under stock names, in its dtype.

    An adapter is merged: W + scaling B A in fp32, rounded once. Merged weights are on the CPU,
    the others are the model's own tensors.
    """
    backbone = model.backbone
    weights, adapter = split_state(backbone, model.state_dict())
    merged = {}
    for name, weight in weights.items():
        if name in adapter:
            weight = weight.float() + adapter[name].change()
            weight = weight.to(backbone.dtype).cpu()
        merged[name] = weight
    # Tied weights are stored once.
    if backbone.config.tie_word_embeddings:
        del merged["lm_head.weight"]
    return merged


def save_processor(settings: VideoSettings, path: Path) -> None:
    """Write the two files of a Qwen3-VL's processor; vLLM plans its memory by ``size``."""
    most = settings.max_pixels
    if settings.budget == "frame":
        most *= settings.max_frames
    content: dict[str, Any] = {
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": most},
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "processor_class": "Qwen3VLProcessor",
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast"
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor"
        },
    }
    for name, kind in files.items():
        text = json.dumps({**content, **kind}, indent=1)
        (path / name).write_text(text + "\n", encoding="utf-8")
