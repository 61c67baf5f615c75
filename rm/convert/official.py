"""Read a checkpoint of the official DeScore release into a `DeScore`, whose `save` then writes our layout.

What its stage 1 leaves in ``checkpoint-N/`` (WYuan1001/DeScore_project_page, cold_start/trainer_qwen3.py `_save`)::

    config.json, model*.safetensors   the weights as trained (vision, mergers), LoRA NOT merged, without the head
    lora_adapter/                     adapter_model.safetensors; adapter_config.json, whose alpha is always 128
    tokenizer files                   `<Reward>` is an additional special token, an ordinary row of the embeddings,
                                      which were resized to len(tokenizer)
    rm_head.pth                       a pickle: {"rm_head.weight" or "base_model.model.rm_head.weight": (1, d)}

Stage 2 wraps the head in {"model": ...} and leaves FSDP shards, which have to be merged into safetensors first; it
trains without LoRA. Names of weights may be those of a peft model or plain.

What becomes of them:

    W      W + (alpha / r) B A, in fp32
    query  the row of `<Reward>`, at the same id
    `<Reward>` leaves the tokenizer. It would be harmless: `rm.prompt.encode_text` cuts special tokens that a text
           spells, and the id is never sampled. But then it is our code alone that keeps a user's prompt from placing
           a second query; without the string nothing can, and the id is the first free one, as in every judge of ours
    rows   grow to the next multiple of 64 with copies of the MEAN row; such ids are never sampled

The weights are exact: one token sequence has one reward here and there. The sequence is ours in every case, with the
chain of thought in the assistant's turn (the official stage 2); the official inference has it in the user's turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.lora import LowRank, low_ranks, stock_name
from rm.config import VideoSettings
from rm.convert.weights import exactly, load_any, load_safetensors, open_safetensors
from rm.model import DeScore
from rm.prompt import PROMPT_SLOT, PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

REWARD = "<Reward>"
ADAPTER, HEAD, HEADS = (
    "lora_adapter",
    "rm_head.weight",
    ("rm_head.safetensors", "rm_head.pth"),
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROMPT_MARK, VIDEO_MARK = "[insert prompt here]", "<video>"
EMBEDDINGS, UNEMBEDDINGS = "model.language_model.embed_tokens.weight", "lm_head.weight"
_NAMING_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZER = (
    *_NAMING_TOKENS,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
_OTHER_LORAS = (
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


@dataclass(frozen=True)
class Conversion:
    """A judge on the CPU, and where it came from.

    head_from  the file that held the head
    merged     linears whose LoRA was merged
    """

    judge: DeScore
    head_from: Path
    merged: int


def convert(
    path: str | Path,
    *,
    template: PromptTemplate,
    settings: VideoSettings | None = None,
    head: Path | None = None,
    base: Path | None = None,
    lora: bool = True,
    alpha: float | None = None,
    allow_pickle: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Conversion:
    """Read a folder as above. FileNotFoundError or ValueError name the file, and the option that would help.

    settings      None is the official 2 fps and 448 x 448 pixels a frame, with this vision tower's patches
    head          a .safetensors or .pth; None looks among the weights, then for rm_head.safetensors and rm_head.pth
    base          where config.json is, if not in the folder
    lora          False for a checkpoint without any (stage 2)
    alpha         instead of the adapter's own, which is 128 whatever the training's was
    allow_pickle  read a head that is a .pth, tensors only
    dtype         of the backbone. Changes that LoRA made are small: bfloat16 rounds part of them away
    """
    from transformers import Qwen3VLForConditionalGeneration

    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    config = _config(path, base)
    index = index_weights(path)
    if EMBEDDINGS not in index:
        raise ValueError(
            f"{path}: the weights lack {EMBEDDINGS}; this is no Qwen3-VL of transformers 4.57 or later"
        )
    tokenizer, query_id = read_tokenizer(path)
    inside = index.pop(HEAD, None)
    if head is None and inside is not None:
        head_from, weight = inside[0], read_weights({HEAD: inside}, {})[HEAD]
    else:
        head_from = head or _find_head(path)
        weight = read_head(head_from, allow_pickle=allow_pickle)
    if not lora and (path / ADAPTER).exists():
        raise ValueError(
            f"{path / ADAPTER} holds what LoRA learnt; --no-lora is for checkpoints without it"
        )
    adapter = read_adapter(path / ADAPTER, alpha=alpha) if lora else {}
    state = read_weights(index, adapter)

    rows, width = state[EMBEDDINGS].shape
    if weight.shape != (1, width):
        raise ValueError(
            f"{head_from}: the head is {tuple(weight.shape)}, but the hidden size wants (1, {width})"
        )
    if query_id >= rows:
        raise ValueError(
            f"{path}: {REWARD} is id {query_id}, but {EMBEDDINGS} has {rows} rows"
        )
    query = state[EMBEDDINGS][query_id : query_id + 1].float().clone()
    for name in state:
        grown = (
            _grown(state[name]) if name in (EMBEDDINGS, UNEMBEDDINGS) else state[name]
        )
        state[name] = grown.to(getattr(torch, dtype))
    config.text_config.vocab_size = len(state[EMBEDDINGS])

    vision = config.vision_config
    settings = settings or VideoSettings(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    backbone = exactly(
        Qwen3VLForConditionalGeneration, config, state, dtype=dtype, source=path
    )
    judge = DeScore(backbone, tokenizer, template, settings, query_id)
    judge.load_state_dict({"query": query, "head.weight": weight.float()}, strict=False)
    return Conversion(judge.eval(), head_from, len(adapter))


def read_template(path: str | Path) -> PromptTemplate:
    """A prompt.json of ours, or a text like the official instruction, which marks its slots by
    ``[insert prompt here]`` and, after it, ``<video>``. ValueError names the file.
    """
    path = Path(path)
    if path.suffix == ".json":
        return PromptTemplate.load(path)
    text = path.read_text(encoding="utf-8")
    before, *after = text.split(VIDEO_MARK)
    if (
        len(after) != 1
        or text.count(PROMPT_MARK) != 1
        or PROMPT_MARK not in before
        or PROMPT_SLOT in text
    ):
        raise ValueError(
            f"{path}: needs {PROMPT_MARK} once and, after it, {VIDEO_MARK} once (or be a .json)"
        )
    return PromptTemplate(before.replace(PROMPT_MARK, PROMPT_SLOT), after[0])


# ---------------------------------------------------------------------- weights


def index_weights(path: Path) -> dict[str, tuple[Path, str]]:
    """Stock name -> the safetensors file that holds it, and its name there. Reads headers only."""
    found: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(path):
        with open_safetensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118, not a mapping
                name = stock_name(key)
                if name in found:
                    raise ValueError(
                        f"{file}: {key} and {found[name][1]} are both {name}"
                    )
                if ".lora_" in name:
                    raise ValueError(
                        f"{file}: holds {key}; LoRA is expected in {ADAPTER}/ only"
                    )
                found[name] = (file, key)
    return found


def read_weights(
    index: Mapping[str, tuple[Path, str]], adapter: Mapping[str, LowRank]
) -> dict[str, Tensor]:
    """Everything indexed, plus the adapter's changes: fp32 where there is one, else as stored."""
    if lost := sorted(set(adapter) - set(index)):
        raise ValueError(
            f"{ADAPTER}: {len(lost)} adapters have no weight, such as {lost[0]}"
        )
    state = {}
    for name, (file, key) in index.items():
        with open_safetensors(file) as tensors:
            state[name] = tensors.get_tensor(key)
        if name in adapter:
            change = adapter[name].change()
            if change.shape != state[name].shape:
                raise ValueError(
                    f"{ADAPTER}: {name} is {tuple(state[name].shape)}, its LoRA {tuple(change.shape)}"
                )
            state[name] = state[name].float() + change
    return state


def read_adapter(folder: Path, *, alpha: float | None = None) -> dict[str, LowRank]:
    """Stock name of a weight -> what LoRA adds to it; the scaling is alpha / r."""
    config_file, file = (
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
    )
    if missing := [f.name for f in (config_file, file) if not f.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}: stage 1 keeps LoRA apart from the weights, and without it the "
            "language model is the untrained one; if there was none, or it is merged, say --no-lora"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if other := [key for key in _OTHER_LORAS if config.get(key)]:
        raise ValueError(
            f"{config_file}: {other[0]}={config[other[0]]!r} is not the official release's LoRA"
        )
    alpha, rank = config.get("lora_alpha") if alpha is None else alpha, config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"{config_file}: lora_alpha={alpha!r} and r={rank!r} must be a number and a whole one above 0"
        )
    return low_ranks(load_safetensors(file), rank=rank, alpha=alpha, source=file)


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        names = (
            json.loads((path / INDEX).read_text(encoding="utf-8"))
            .get("weight_map", {})
            .values()
        )
        files = [path / name for name in sorted(set(names))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{path} lacks {', '.join(missing)}, which {INDEX} names"
            )
        return files
    if shards := sorted(path.rglob("model_world_size_*_rank_*.pt")):
        raise ValueError(
            f"{shards[0]} is one of stage 2's FSDP shards: merge them into {WEIGHTS} with EasyR1's tools"
        )
    if pickled := sorted(path.glob("*.bin")):
        raise ValueError(f"{pickled[0]} is a pickle: save the weights as {WEIGHTS}")
    raise FileNotFoundError(f"{path} has no weights: it lacks {WEIGHTS} and {INDEX}")


def _grown(weight_VD: Tensor) -> Tensor:
    """Rows up to the next multiple of 64: odd sizes are slow and fragile on GPUs."""
    missing = -len(weight_VD) % 64
    mean_1D = weight_VD.float().mean(0, keepdim=True).to(weight_VD.dtype)
    return torch.cat([weight_VD, mean_1D.expand(missing, -1)])


# ---------------------------------------------------------------------- the head


def read_head(path: Path, *, allow_pickle: bool) -> Tensor:
    """The head's weight, (1, d), from a .safetensors, or, if allowed, a .pth."""
    found = load_any(path, allow_pickle=allow_pickle)
    found = found.get("model", found) if isinstance(found, dict) else found
    names = [stock_name(name) for name in found] if isinstance(found, dict) else []
    if (
        len(names) != 1
        or names[0] not in (HEAD, "weight")
        or not isinstance(next(iter(found.values())), Tensor)
    ):
        raise ValueError(
            f"{path}: expected the one tensor {HEAD!r} or 'weight', found {names or type(found).__name__}"
        )
    return next(iter(found.values()))


def _find_head(path: Path) -> Path:
    found = [path / name for name in HEADS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path} has no head: no {HEAD} in its weights, no {' or '.join(HEADS)}; give --head"
        )
    return found[0]


# ---------------------------------------------------------------------- tokenizer, config, backbone


def read_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer without `<Reward>`, and the id that `<Reward>` had. Every other id stays, or ValueError."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{path} has no tokenizer: it lacks tokenizer.json")
    official = AutoTokenizer.from_pretrained(path.as_posix())
    query_id = official.get_added_vocab().get(REWARD)
    if query_id is None:
        raise ValueError(
            f"{path}: the tokenizer has no token {REWARD}: this is no DeScore, or another one's tokenizer"
        )
    with TemporaryDirectory() as folder:
        for file in (path / name for name in _TOKENIZER if (path / name).is_file()):
            if file.name in _NAMING_TOKENS:
                text = json.dumps(
                    _without(REWARD, json.loads(file.read_text(encoding="utf-8"))),
                    ensure_ascii=False,
                )
                Path(folder, file.name).write_text(text, encoding="utf-8")
            else:
                shutil.copy(file, folder)
        ours = AutoTokenizer.from_pretrained(folder)
    kept = {token: i for token, i in official.get_vocab().items() if token != REWARD}
    if ours.get_vocab() != kept or set(ours.all_special_ids) != set(
        official.all_special_ids
    ) - {query_id}:
        raise ValueError(
            f"{path}: taking {REWARD} out of the tokenizer changes other tokens"
        )
    return ours, query_id


def _without(token: str, value: Any) -> Any:
    """A tokenizer's JSON without a token: as a key, as a string, or as an object with that ``content``."""

    def kept(item: Any) -> bool:
        return item != token and not (
            isinstance(item, dict) and item.get("content") == token
        )

    if isinstance(value, dict):
        return {
            k: _without(token, v) for k, v in value.items() if k != token and kept(v)
        }
    if isinstance(value, list):
        return [_without(token, item) for item in value if kept(item)]
    return value


def _config(path: Path, base: Path | None) -> Qwen3VLConfig:
    from transformers import AutoConfig

    folders = [
        folder
        for folder in (path, base)
        if folder is not None and (folder / "config.json").is_file()
    ]
    if not folders:
        raise FileNotFoundError(
            f"{path} lacks config.json; name the Qwen3-VL it was trained from with --base"
        )
    config = AutoConfig.from_pretrained(folders[0].as_posix())
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"{folders[0] / 'config.json'}: model_type is {config.model_type!r}, DeScore's is 'qwen3_vl'"
        )
    return config
