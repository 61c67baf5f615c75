"""A trained judge as others get it: checked name by name against the stock model, then copied as it is.

`DeScore.save` has merged LoRA and kept the query token's embedding and the head in a file of their own, so the folder
is a stock Qwen3-VL already; nothing is computed here, and the copy has the same rewards to the bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rm.calibration import CALIBRATION_FILE
from rm.config import VideoSettings
from rm.convert.official import INDEX, index_weights
from rm.convert.weights import load_safetensors, open_safetensors
from rm.model import DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE, DeScore

_OWN = (DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE)
_STOCK = ("config.json", "generation_config.json", INDEX)
_TOKENIZER = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_LOCAL = (
    "_name_or_path",
    "name_or_path",
)  # where a config or a tokenizer was once loaded from


@dataclass(frozen=True)
class RewardModelFolder:
    """A folder that holds a whole judge.

    weights     the backbone's files
    tensors     how many weights they hold
    dtype       as the config says
    query_id    the first query token's id; ``dimensions`` has a name for each
    """

    path: Path
    weights: tuple[Path, ...]
    tensors: int
    dtype: str
    query_id: int
    dimensions: tuple[str, ...]
    video: VideoSettings


def inspect(path: str | Path) -> RewardModelFolder:
    """Read headers, the query and the head. FileNotFoundError or ValueError name the file and what is wrong with it."""
    path = Path(path)
    if missing := [
        name for name in (*_OWN, "config.json") if not (path / name).is_file()
    ]:
        raise FileNotFoundError(
            f"{path} is not a DeScore checkpoint: it lacks {', '.join(missing)}"
        )
    index = index_weights(path)
    config = _require_stock(path, index)
    dimensions = DeScore.dimensions_in(path)
    query_id = json.loads((path / DESCORE_FILE).read_text(encoding="utf-8"))["query_id"]
    own, want = (
        load_safetensors(path / HEAD_FILE),
        (len(dimensions), config.text_config.hidden_size),
    )
    found = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if found != {"query": want, "head": want}:
        raise ValueError(
            f"{path / HEAD_FILE} holds {found}, want query and head of {want}"
        )
    return RewardModelFolder(
        path,
        weights=tuple(sorted({file for file, _ in index.values()})),
        tensors=len(index),
        dtype=str(config.dtype).removeprefix("torch."),
        query_id=query_id,
        dimensions=tuple(dimensions),
        video=VideoSettings.load(path / VIDEO_FILE),
    )


def copy(judge: RewardModelFolder, out: Path) -> list[Path]:
    """Write what belongs to the judge into ``out``, and nothing else that lies in its folder. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    names = [*_OWN, *_STOCK, *_TOKENIZER, CALIBRATION_FILE]
    files = [
        *judge.weights,
        *(judge.path / name for name in names if (judge.path / name).is_file()),
    ]
    for file in files:
        if file.suffix == ".json" and any(
            f'"{key}"' in file.read_text(encoding="utf-8") for key in _LOCAL
        ):
            text = json.dumps(
                _public(json.loads(file.read_text(encoding="utf-8"))),
                indent=2,
                ensure_ascii=False,
            )
            (out / file.name).write_text(text + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, out / file.name)
    return [out / file.name for file in files]


def _require_stock(path: Path, index: dict[str, tuple[Path, str]]) -> Any:
    """The config; ValueError unless the files hold the stock model's weights, all and no others, of its shapes."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    config = AutoConfig.from_pretrained(path.as_posix())
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"{path / 'config.json'}: model_type is {config.model_type!r}, DeScore's is 'qwen3_vl'"
        )
    with torch.device("meta"):
        stock = Qwen3VLForConditionalGeneration(config)
    want = {name: list(weight.shape) for name, weight in stock.state_dict().items()}
    found = {}
    for file in sorted({file for file, _ in index.values()}):
        with open_safetensors(file) as tensors:
            for name, (_, key) in ((n, at) for n, at in index.items() if at[0] == file):
                found[name] = tensors.get_slice(key).get_shape()
    missing = want.keys() - found.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    problems = [f"unexpected {name}" for name in sorted(found.keys() - want.keys())]
    problems += [f"missing {name}" for name in sorted(missing)]
    both = sorted(want.keys() & found.keys())
    problems += [
        f"{name} is {found[name]}, want {want[name]}"
        for name in both
        if found[name] != want[name]
    ]
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(
            f"{path}: weights do not fit config.json ({len(problems)} problems): {shown}"
        )
    return config


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if key not in _LOCAL}
    return [_public(item) for item in value] if isinstance(value, list) else value
