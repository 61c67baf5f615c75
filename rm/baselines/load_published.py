"""Read the published VideoReward and HPSv3 into a `Qwen2VLRewardModel`, whose `save` then writes our layout.

VideoReward (KwaiVGI/VideoAlign; the folder KlingTeam/VideoReward)::

    model_config.json        data_config (fps, max_frame_pixels, ...), model_config (output_dim), peft_lora_config
                             (lora_r, lora_alpha), inference_config (VQ_mean, VQ_std, ... of the three dimensions)
    checkpoint-N/model.pth   a pickle: the state of a peft model, LoRA beside its linears, and rm_head.weight

HPSv3 (MizzenAI/HPSv3)::

    HPSv3.safetensors        the whole state: backbone, lm_head, rm_head.{0,3,5}.{weight,bias}; two numbers, mu and
                             what is made into sigma, of which mu is the score

Neither brings config or tokenizer: those are the base's, Qwen2-VL-2B- and -7B-Instruct, to whose tokenizer the reward
tokens are added in the order below. Names may be those of transformers before 4.52 (model.layers, visual) or after
(model.language_model.layers, model.visual). The instruction is a text file of the user's, the model's own: for
VideoReward `DETAILED_PROMPT_WITH_SPECIAL_TOKEN` of prompt_template.py, for HPSv3 `INSTRUCTION` followed by
`prompt_with_special_token` of data_collator_qwen.py. Every byte counts, newlines at both ends too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.lora import LORA_NAME, low_ranks, stock_name
from rm.baselines.qwen2_vl import HEAD, Layout, Qwen2VLRewardModel, head_of
from rm.config import VideoSettings
from rm.convert.weights import exactly, load_any
from rm.prompt import PROMPT_SLOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOTS = (PROMPT_SLOT, "{text_prompt}")
VIDEOREWARD_TOKENS, DIMENSIONS = (
    ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
    ("VQ", "MQ", "TA"),
)
EMBEDDINGS = "language_model.embed_tokens.weight"
HPSV3_TOKENS, HPSV3_OUTPUTS, HPSV3_FILE = (
    ("<|Reward|>",),
    ("mu", "sigma"),
    "HPSv3.safetensors",
)
# what CLIP's images were normalised by, and so Qwen2-VL's; frames are cut into patches of 14, merged 2 x 2
CLIP_COLOURS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
VIDEO_MIN_PIXELS, IMAGE_PIXELS = 128 * 28 * 28, 256 * 28 * 28


@dataclass(frozen=True)
class LoadedModel:
    """A judge on the CPU, and what was found: the weights' file, tensors in it, linears whose LoRA was merged."""

    judge: Qwen2VLRewardModel
    source: Path
    tensors: int
    merged: int


def read_videoreward(
    path: str | Path,
    *,
    base: str | Path,
    instruction: str | Path,
    allow_pickle: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> LoadedModel:
    """A folder as above. FileNotFoundError, ValueError name the file, and the option that would help."""
    path = Path(path)
    config_file = path / "model_config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file}: no such file; VideoReward's folder has it beside checkpoint-N"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    try:
        data, lora = config["data_config"], config["peft_lora_config"]
        settings = {
            "fps": float(data["fps"]),
            "max_pixels": int(data["max_frame_pixels"]),
        }
        numbers = config["inference_config"]
        normal = {
            name: (float(numbers[f"{name}_mean"]), float(numbers[f"{name}_std"]))
            for name in DIMENSIONS
        }
        rank, alpha = int(lora["lora_r"]), float(lora["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {type(error).__name__} {error}") from error
    wanted = {
        "sample_type": "uniform",
        "prompt_template_type": "detailed_special",
        "num_frames": None,
    }
    for key, value in wanted.items():
        if data.get(key, value) != value:
            raise ValueError(
                f"{config_file}: {key}={data[key]!r}, but the published VideoReward has {value!r}"
            )
    if lora.get("use_rslora"):
        raise ValueError(f"{config_file}: use_rslora scales LoRA by another rule")
    file = _weights_of_videoreward(path)
    state = load_any(file, allow_pickle=allow_pickle)
    layout = _layout(instruction, VIDEOREWARD_TOKENS, DIMENSIONS, "video", normal)
    return _read(
        file, state, base, layout, rank=rank, alpha=alpha, dtype=dtype, sizes=settings
    )


def read_hpsv3(
    path: str | Path,
    *,
    base: str | Path,
    instruction: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> LoadedModel:
    """HPSv3.safetensors, or the folder that holds it. Errors as above."""
    file = Path(path) / HPSV3_FILE if Path(path).is_dir() else Path(path)
    state = load_any(file, allow_pickle=False)
    layout = _layout(instruction, HPSV3_TOKENS, HPSV3_OUTPUTS, "image", {})
    return _read(
        file,
        state,
        base,
        layout,
        dtype=dtype,
        sizes={"min_pixels": IMAGE_PIXELS, "max_pixels": IMAGE_PIXELS},
    )


def read_instruction(path: str | Path) -> str:
    """The text, its slot ``{text_prompt}`` or ``{prompt}`` as ours. ValueError names the file."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    found = [slot for slot in SLOTS if slot in text]
    if len(found) != 1 or text.count(found[0]) != 1:
        raise ValueError(
            f"{path}: needs one slot {' or '.join(SLOTS)}, found {sum(map(text.count, SLOTS))}"
        )
    return text.replace(found[0], PROMPT_SLOT)


def _layout(
    instruction: str | Path, tokens: Any, outputs: Any, media: Any, normal: Any
) -> Layout:
    try:
        return Layout(
            read_instruction(instruction),
            tokens,
            outputs,
            media,
            VideoSettings(),
            normal,
        )
    except ValueError as error:
        raise ValueError(
            f"{instruction}: {error}"
            if str(instruction) not in str(error)
            else str(error)
        ) from error


def _weights_of_videoreward(path: Path) -> Path:
    """The newest checkpoint's."""
    folders = [
        f
        for f in path.glob("checkpoint-*")
        if f.name.removeprefix("checkpoint-").isdigit()
    ]
    if not folders:
        raise FileNotFoundError(f"{path} has no checkpoint-N")
    newest = max(folders, key=lambda f: int(f.name.removeprefix("checkpoint-")))
    files = [
        newest / name
        for name in ("model.safetensors", "model.pth")
        if (newest / name).is_file()
    ]
    if not files:
        raise FileNotFoundError(f"{newest} has neither model.pth nor model.safetensors")
    return files[0]


def _read(
    file: Path,
    state: Any,
    base: str | Path,
    layout: Layout,
    *,
    dtype: str,
    sizes: dict[str, Any],
    rank: int = 0,
    alpha: float = 0.0,
) -> LoadedModel:
    """Rename, merge, split off the head, add the tokens, and put together: every tensor is used or the file refused."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{file}: expected tensors by name")
    count = len(state)
    lora = {name: value for name, value in state.items() if LORA_NAME.fullmatch(name)}
    changes = low_ranks(lora, rank=rank, alpha=alpha, source=file) if lora else {}
    plain = {
        stock_name(name): value for name, value in state.items() if name not in lora
    }
    if lost := sorted(set(changes) - set(plain)):
        raise ValueError(
            f"{file}: {len(lost)} adapters have no weight, such as {lost[0]}"
        )
    for name, change in changes.items():
        plain[name] = plain[name].float() + change.change()
    head = head_of(
        {
            n.removeprefix(HEAD): plain.pop(n).float()
            for n in list(plain)
            if n.startswith(HEAD)
        }
    )
    plain.pop("lm_head.weight", None)  # the vocabulary's head, which no judge reads
    backbone_state = {
        _present_name(name): value.to(getattr(torch, dtype))
        for name, value in plain.items()
    }

    if EMBEDDINGS not in backbone_state:
        raise ValueError(
            f"{file}: no embeddings of tokens among its {count} tensors; this is no Qwen2-VL"
        )
    tokenizer, rows = _tokenizer(base, layout.tokens), len(backbone_state[EMBEDDINGS])
    if len(tokenizer) > rows:
        raise ValueError(
            f"{base}: its tokenizer and the reward tokens are {len(tokenizer)}, {file} has {rows} rows"
        )
    config = Qwen2VLConfig.from_pretrained(Path(base).as_posix())
    config.text_config.vocab_size = rows
    vision = config.vision_config
    patches = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    settings = VideoSettings(
        **{"min_pixels": VIDEO_MIN_PIXELS, **sizes},
        **patches,
        temporal_patch_size=vision.temporal_patch_size,
        **CLIP_COLOURS,
    )
    backbone = exactly(Qwen2VLModel, config, backbone_state, dtype=dtype, source=file)
    judge = Qwen2VLRewardModel(
        backbone, head, tokenizer, replace(layout, settings=settings)
    ).eval()
    return LoadedModel(judge, file, count, len(changes))


def _present_name(name: str) -> str:
    """transformers' name of a Qwen2VLModel's weight, from the one before 4.52 or after."""
    name = name.removeprefix("model.")
    return (
        name
        if name.startswith(("visual.", "language_model."))
        else f"language_model.{name}"
    )


def _tokenizer(base: str | Path, tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(base).as_posix())
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens],
        special_tokens=True,
    )
    return tokenizer
