"""Check a trained DeScore against the stock Qwen3-VL, name by name, and copy it for others to load.

`DeScore.save` has written the query and the head into a separate file. A folder without an
adapter is a stock Qwen3-VL already, and its copy has the same rewards to the last bit. An adapter
is merged in fp32 and stored in the weights' dtype; `copy_release` returns what rounding takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from common.lora import LowRank, MergeLoss, stock_name
from common.state_dicts import raise_problems, shapes_in, state_dict_problems
from common.weight_files import load_safetensors, open_safetensors
from rm.calibration import CALIBRATION_FILE
from rm.cascade import THINKING_FILE
from rm.config import VideoSettings
from rm.convert.official import (
    INDEX,
    TOKEN_FILES,
    VOCABULARY_FILES,
    StoredTensor,
    index_weights,
    pruned,
    read_qwen3_config,
)
from rm.convert.weights import require_weights
from rm.lora import ADAPTER_CONFIG, read_peft_adapter
from rm.model import DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE, DeScore

REQUIRED_FILES = (DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE, "config.json")
OPTIONAL_FILES = (
    "generation_config.json",
    INDEX,
    *TOKEN_FILES,
    *VOCABULARY_FILES,
    CALIBRATION_FILE,
    THINKING_FILE,
)
# Where transformers records the folder that a config or a tokenizer was loaded from.
LOCAL_KEYS = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class RewardModelFolder:
    """A folder that holds a complete DeScore.

    weights     The backbone's files.
    tensors     The number of weights in them.
    dtype       The backbone's dtype, as config.json gives it.
    query_id    The first query token's id.
    dimensions  The rewards' names, in the order of their query tokens.
    adapter     What a bfloat16 training adds to each weight; empty without.
    """

    path: Path
    weights: tuple[Path, ...]
    tensors: int
    dtype: str
    query_id: int
    dimensions: tuple[str, ...]
    video: VideoSettings
    adapter: Mapping[str, LowRank]


def inspect(path: str | Path) -> RewardModelFolder:
    """Check a DeScore folder by its headers, query and head.

    FileNotFoundError or ValueError name the file and what is wrong with it.
    """
    from transformers import Qwen3VLForConditionalGeneration

    path = Path(path)
    missing = [name for name in REQUIRED_FILES if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} is not a DeScore checkpoint: it lacks {', '.join(missing)}"
        )

    # The backbone must be the stock model.
    index = index_weights(path)
    config = read_qwen3_config(path)
    found = _shapes(index)
    require_weights(found, Qwen3VLForConditionalGeneration, config, path)

    # Every layer of the adapter must be in it.
    adapter = {}
    if (path / ADAPTER_CONFIG).is_file():
        adapter = read_peft_adapter(path)
        changed = {name: pair.shape for name, pair in adapter.items()}
        wanted = {name: shape for name, shape in found.items() if name in changed}
        problems = state_dict_problems(changed, wanted)
        raise_problems(problems, f"{path / ADAPTER_CONFIG} does not fit the weights")

    # The query and the head have a row for each reward.
    dimensions = DeScore.dimensions_in(path)
    expected = (len(dimensions), config.text_config.hidden_size)
    shapes = shapes_in(load_safetensors(path / HEAD_FILE))
    if shapes != {"query": expected, "head": expected}:
        raise ValueError(
            f"{path / HEAD_FILE} holds {shapes}, but query and head must be {expected}"
        )

    # Collect the facts for the model card.
    record = read_json(path / DESCORE_FILE)
    return RewardModelFolder(
        path,
        weights=tuple(sorted({stored.file for stored in index.values()})),
        tensors=len(index),
        dtype=str(config.dtype).removeprefix("torch."),
        query_id=record["query_id"],
        dimensions=tuple(dimensions),
        video=VideoSettings.load(path / VIDEO_FILE),
        adapter=adapter,
    )


def copy_release(folder: RewardModelFolder, out: Path) -> float:
    """Copy the reward model's files into ``out``, and nothing else that lies in its folder.

    Merges the adapter, and returns the share of it that rounding took, see `MergeLoss`.
    """
    # Other files, such as the optimizer's, stay where they are.
    out.mkdir(parents=True, exist_ok=True)
    loss = MergeLoss()
    for file in folder.weights:
        if folder.adapter:
            _write_merged(file, out / file.name, folder.adapter, loss)
        else:
            shutil.copyfile(file, out / file.name)
    for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
        file = folder.path / name
        if not file.is_file():
            continue
        # Keep the paths of this machine out of what is published.
        text = file.read_text(encoding="utf-8") if file.suffix == ".json" else ""
        if any(f'"{key}"' in text for key in LOCAL_KEYS):
            content = pruned(json.loads(text), lambda key, _: key in LOCAL_KEYS)
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (out / file.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, out / file.name)
    return loss.share


def _write_merged(
    file: Path, out: Path, adapter: Mapping[str, LowRank], loss: MergeLoss
) -> None:
    """Write a file of weights with the adapter merged into those that it changes."""
    from safetensors.torch import save_file

    tensors = load_safetensors(file)
    for key, tensor in tensors.items():
        pair = adapter.get(stock_name(key))
        if pair is not None:
            tensors[key] = loss.merge(tensor, pair, name=f"{key} of {file}")
    save_file(tensors, out, metadata={"format": "pt"})


def _shapes(index: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    # Headers only: the weights are not read.
    shapes = {}
    for name, stored in index.items():
        with open_safetensors(stored.file) as tensors:
            shapes[name] = tuple(tensors.get_slice(stored.key).get_shape())
    return shapes
