"""Convert a checkpoint of the official DeScore release into a `DeScore`.

Stage 1 leaves this in ``checkpoint-N/`` (WYuan1001/DeScore_project_page,
cold_start/trainer_qwen3.py, `_save`)::

    config.json, model*.safetensors   the trained weights; LoRA is NOT merged, the head is missing
    lora_adapter/                     adapter_model.safetensors, adapter_config.json (alpha 128)
    tokenizer files                   `<Reward>` is an additional special token with an ordinary
                                      row of the embeddings, resized to len(tokenizer)
    rm_head.pth                       a pickle: {"rm_head.weight": (1, d)}, or with peft's prefix

Stage 2 wraps the head in {"model": ...} and leaves FSDP shards, which have to be merged into
safetensors first. It trains without LoRA. Names of weights may be those of a peft model or plain.

The conversion:

    weights    become W + (alpha / r) B A, computed in fp32.
    query      is the embedding of `<Reward>`, at the same id.
    tokenizer  loses `<Reward>`, so that no text can spell a second query. Its id is the first free
               id, as in every DeScore of ours.
    rows       of the embeddings grow to the next multiple of 64 with copies of the MEAN row.
               Generation never samples such ids.

A token sequence has the same reward before and after. The sequence itself is always ours, with
the chain of thought in the assistant's turn, as in the official stage 2; the official inference
script puts it into the user's turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.files import read_json
from common.lora import LowRank, MergeLoss, stock_name
from common.weight_files import open_safetensors, weight_files
from rm.config import VideoSettings
from rm.convert.weights import build_model, load_tensor_file, merge_lora
from rm.lora import ADAPTER_CONFIG, ADAPTER_FILE, read_peft_adapter
from rm.model import DeScore
from rm.prompt import PROMPT_SLOT, PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

REWARD = "<Reward>"
ADAPTER = "lora_adapter"
HEAD = "rm_head.weight"
HEAD_FILES = ("rm_head.safetensors", "rm_head.pth")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROMPT_MARK = "[insert prompt here]"
VIDEO_MARK = "<video>"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
UNEMBEDDINGS = "lm_head.weight"

# Files of a tokenizer that list its added tokens, and the others.
TOKEN_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARY_FILES = (
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Conversion:
    """A converted reward model on the CPU.

    head_from  The file that held the head.
    merged     The number of linears whose LoRA was merged.
    lost       The share of LoRA's change that rounding took, see `MergeLoss`.
    """

    model: DeScore
    head_from: Path
    merged: int
    lost: float


class StoredTensor(NamedTuple):
    """The safetensors file that holds a weight, and the weight's name in it."""

    file: Path
    key: str


def convert_checkpoint(
    path: Path,
    *,
    template: PromptTemplate,
    base: Path | None = None,
    head: Path | None = None,
    lora: bool = True,
    alpha: float | None = None,
    allow_pickle: bool = False,
    settings: VideoSettings | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Conversion:
    """Convert an official checkpoint, the folder described above, into a DeScore.

    base          A folder with a config.json, for a checkpoint that has none.
    head          A .safetensors or .pth. None looks among the weights, then for `HEAD_FILES`.
    lora          False for a checkpoint without LoRA (stage 2).
    alpha         Replaces the alpha of adapter_config.json, which is 128 whatever was trained.
    allow_pickle  Allows to read a head that is a .pth; only tensors are read.
    settings      None means the official 2 fps and 448 x 448 pixels a frame, with the patch
                  sizes of this vision tower.
    dtype         The backbone's; bfloat16 rounds part of LoRA's small changes away.

    FileNotFoundError or ValueError name the file and the option that would help.
    """
    from transformers import Qwen3VLForConditionalGeneration

    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")

    # Read every part, so that a missing file is known before any work is done.
    config = _read_config(path, base)
    index = index_weights(path)
    if EMBEDDINGS not in index:
        raise ValueError(
            f"{path}: the weights lack {EMBEDDINGS}; they must be those of a Qwen3-VL of "
            "transformers 4.57 or later"
        )
    tokenizer, query_id = read_tokenizer(path)
    stored = index.pop(HEAD, None)
    weight, file = _find_head(path, head, stored, allow_pickle=allow_pickle)
    width = config.text_config.hidden_size
    if weight.shape != (1, width):
        raise ValueError(f"{file}: the head is {tuple(weight.shape)}, not (1, {width})")

    # Neither option may silently leave a trained LoRA out.
    folder = path / ADAPTER
    if not lora and folder.exists():
        raise ValueError(f"{folder} holds a trained LoRA, so --no-lora is wrong here")
    low_rank = read_adapter(folder, alpha=alpha) if lora else {}
    state = _read_tensors(index)
    merge_lora(state, low_rank, source=folder)

    # Take the query from the embeddings before they are resized and rounded.
    rows = len(state[EMBEDDINGS])
    if query_id >= rows:
        raise ValueError(
            f"{path}: {REWARD} is id {query_id}, but {EMBEDDINGS} has {rows} rows"
        )
    query = state[EMBEDDINGS][query_id : query_id + 1].float().clone()
    _pad_rows(state)
    exact = state
    state = {name: row.to(getattr(torch, dtype)) for name, row in exact.items()}
    lost = _rounding_loss(low_rank, exact, state)
    config.text_config.vocab_size = len(state[EMBEDDINGS])

    # Build the model.
    vision = config.vision_config
    settings = settings or VideoSettings(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    backbone = build_model(
        Qwen3VLForConditionalGeneration,
        config,
        state,
        dtype=dtype,
        source=path,
    )
    model = DeScore(backbone, tokenizer, template, settings, query_id)
    model.load_head({"query": query, "head": weight.float()}, file)
    return Conversion(model.eval(), file, len(low_rank), lost)


def _rounding_loss(
    lora: Mapping[str, LowRank],
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
) -> float:
    """The share of LoRA's change that rounding the merged weights has taken."""
    loss = MergeLoss()
    for name, pair in lora.items():
        loss.add(pair.change(), exact[name], rounded[name])
    return loss.share


def read_template(path: str | Path) -> PromptTemplate:
    """Read a prompt template: our prompt.json, or the official instruction's text.

    The text marks its slots by ``[insert prompt here]`` and, after it, ``<video>``. ValueError
    names the file.
    """
    path = Path(path)
    # Ours.
    if path.suffix == ".json":
        return PromptTemplate.load(path)
    # Every byte around the marks belongs to the prompt.
    text = path.read_text(encoding="utf-8")
    before, _, after = text.partition(VIDEO_MARK)
    marks = (text.count(VIDEO_MARK), text.count(PROMPT_MARK), before.count(PROMPT_MARK))
    if marks != (1, 1, 1) or PROMPT_SLOT in text:
        raise ValueError(
            f"{path} must be a .json, or hold {PROMPT_MARK} once and, after it, {VIDEO_MARK} once"
        )
    return PromptTemplate(before.replace(PROMPT_MARK, PROMPT_SLOT), after)


# ---------------------------------------------------------------------- weights


def index_weights(path: Path) -> dict[str, StoredTensor]:
    """Map the stock name of every weight to its place. Reads headers only."""
    index: dict[str, StoredTensor] = {}
    # Wrapped and plain names of a weight are the same weight.
    for file in _weight_files(path):
        with open_safetensors(file) as tensors:
            names = tensors.keys()
            for key in names:
                name = stock_name(key)
                if name in index:
                    raise ValueError(
                        f"{file}: {key} and {index[name].key} are both {name}"
                    )
                if ".lora_" in name:
                    raise ValueError(
                        f"{file} holds {key}, but LoRA weights belong in {ADAPTER}/"
                    )
                index[name] = StoredTensor(file, key)
    return index


def read_adapter(folder: Path, *, alpha: float | None = None) -> dict[str, LowRank]:
    """Read what LoRA adds to each weight, by stock name; the scaling is alpha / r."""
    files = (ADAPTER_CONFIG, ADAPTER_FILE)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}. Stage 1 saves LoRA apart from the weights; "
            "give --no-lora if there was none or it is merged already"
        )
    # The official file always says alpha 128; the user may know better.
    return read_peft_adapter(folder, alpha=alpha)


def _weight_files(path: Path) -> list[Path]:
    try:
        return weight_files(path, WEIGHTS)
    except FileNotFoundError:
        # Name the mistakes that people make.
        shards = sorted(path.rglob("model_world_size_*_rank_*.pt"))
        if shards:
            raise ValueError(
                f"{shards[0]} is an FSDP shard of stage 2: merge the shards into {WEIGHTS} "
                "with EasyR1's tools"
            ) from None
        pickled = sorted(path.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{pickled[0]} is a pickle: save the weights as {WEIGHTS}"
            ) from None
        raise


def _read_tensors(index: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    # A file is opened once for each weight, which costs little.
    state = {}
    for name, stored in index.items():
        with open_safetensors(stored.file) as tensors:
            state[name] = tensors.get_tensor(stored.key)
    return state


def _pad_rows(state: dict[str, Tensor]) -> None:
    """Add rows up to the next multiple of 64: odd sizes are slow and fragile on GPUs."""
    for name in (EMBEDDINGS, UNEMBEDDINGS):
        if name in state:
            # The new rows are like an average token.
            weight_VD = state[name]
            missing = -len(weight_VD) % 64
            mean_1D = weight_VD.float().mean(0, keepdim=True).to(weight_VD.dtype)
            state[name] = torch.cat([weight_VD, mean_1D.expand(missing, -1)])


# ---------------------------------------------------------------------- the head


def _find_head(
    path: Path, file: Path | None, stored: StoredTensor | None, *, allow_pickle: bool
) -> tuple[Tensor, Path]:
    """Read the head (1, d) from the file that the user names, the weights, or a file beside them.

    Returns it and its file.
    """
    # The user's choice comes first.
    if file is None and stored is not None:
        return _read_tensors({HEAD: stored})[HEAD], stored.file
    if file is None:
        files = [path / name for name in HEAD_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"{path} has no head, neither {HEAD} in its weights nor "
                f"{' or '.join(HEAD_FILES)}; give --head"
            )
        file = files[0]
    return read_head(file, allow_pickle=allow_pickle), file


def read_head(path: Path, *, allow_pickle: bool) -> Tensor:
    """Read the head's weight (1, d) from a .safetensors or, if allowed, a .pth."""
    content = load_tensor_file(path, allow_pickle=allow_pickle)
    # Stage 2 wraps the head in {"model": ...}.
    if isinstance(content, dict):
        content = content.get("model", content)
    names = list(content) if isinstance(content, dict) else [type(content).__name__]
    if len(names) == 1 and stock_name(names[0]) in (HEAD, "weight"):
        # A head is a single matrix.
        weight = content[names[0]]
        if isinstance(weight, Tensor):
            return weight
    raise ValueError(f"{path} must hold the tensor {HEAD!r} and no other, got {names}")


# ---------------------------------------------------------------------- tokenizer and config


def read_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """Read the tokenizer without `<Reward>`, and the id that `<Reward>` had.

    ValueError if the id of any other token would change.
    """
    from transformers import AutoTokenizer

    # Find the id of the reward token.
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{path} has no tokenizer: it lacks tokenizer.json")
    official = AutoTokenizer.from_pretrained(path.as_posix())
    query_id = official.get_added_vocab().get(REWARD)
    if query_id is None:
        raise ValueError(
            f"{path}: the tokenizer has no token {REWARD}, so it is not DeScore's"
        )

    # Write the files again without the token, and read them.
    with TemporaryDirectory() as folder:
        for name in (*TOKEN_FILES, *VOCABULARY_FILES, "config.json"):
            file = path / name
            if not file.is_file():
                continue
            if name in TOKEN_FILES:
                content = read_json(file)
                text = json.dumps(pruned(content, _is_reward), ensure_ascii=False)
                Path(folder, name).write_text(text, encoding="utf-8")
            else:
                shutil.copy(file, folder)
        ours = AutoTokenizer.from_pretrained(folder)

    # Nothing else may have changed.
    vocabulary = official.get_vocab()
    del vocabulary[REWARD]
    special_ids = set(official.all_special_ids) - {query_id}
    if ours.get_vocab() != vocabulary or set(ours.all_special_ids) != special_ids:
        raise ValueError(f"{path}: the ids of other tokens depend on {REWARD}")
    return ours, query_id


def pruned(value: Any, unwanted: Callable[[Any, Any], bool]) -> Any:
    """Remove what is ``unwanted(key, item)`` from JSON; the items of a list have no key."""
    # At any depth.
    if isinstance(value, dict):
        return {
            key: pruned(item, unwanted)
            for key, item in value.items()
            if not unwanted(key, item)
        }
    if isinstance(value, list):
        return [pruned(item, unwanted) for item in value if not unwanted(None, item)]
    return value


def _is_reward(key: Any, item: Any) -> bool:
    # As a key, a text or an object's content.
    if isinstance(item, dict):
        item = item.get("content")
    return REWARD in (key, item)


def _read_config(path: Path, base: Path | None) -> Qwen3VLConfig:
    # A checkpoint of stage 2 may lack it.
    if not (path / "config.json").is_file():
        if base is None or not (base / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} lacks config.json; name the Qwen3-VL it was trained from with --base"
            )
        path = base
    return read_qwen3_config(path)


def read_qwen3_config(folder: Path) -> Qwen3VLConfig:
    """Read config.json; ValueError if it is of another model than Qwen3-VL."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.as_posix())
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {config.model_type!r}, "
            "but DeScore's is 'qwen3_vl'"
        )
    return config
