"""Convert the published VideoReward and HPSv3 into a `Qwen2VLRewardModel`.

VideoReward (KwaiVGI/VideoAlign; the folder KlingTeam/VideoReward)::

    model_config.json        data_config (fps, max_frame_pixels, ...), model_config (output_dim),
                             peft_lora_config (lora_r, lora_alpha), inference_config (VQ_mean,
                             VQ_std, ... of the three dimensions)
    checkpoint-N/model.pth   a pickle: the state of a peft model with LoRA, and rm_head.weight

HPSv3 (MizzenAI/HPSv3)::

    HPSv3.safetensors        the whole state: backbone, lm_head, rm_head.{0,3,5}.{weight,bias}; two
                             outputs, mu and a raw sigma, of which mu is the score

Neither brings a config or a tokenizer: those are the base's, Qwen2-VL-2B- and -7B-Instruct. The
reward tokens are added to its tokenizer in the order below. Names may be those of transformers
before 4.52 (model.layers, visual) or after (model.language_model.layers, model.visual). The
instruction is a text file that the user gives, with the model's exact words, newlines at both ends
included: for VideoReward `DETAILED_PROMPT_WITH_SPECIAL_TOKEN` of prompt_template.py, for HPSv3
`INSTRUCTION` followed by `prompt_with_special_token` of data_collator_qwen.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.files import read_json
from common.lora import LORA_NAME, LoraScales, low_ranks, stock_name
from common.strict_loading import require_finite
from rm.baselines.qwen2_vl import Layout, Qwen2VLRewardModel, take_head
from rm.config import VideoSettings
from rm.convert.weights import build_model, load_tensor_file, merge_lora
from rm.prompt import PROMPT_SLOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOTS = (PROMPT_SLOT, "{text_prompt}")
VIDEOREWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
VIDEOREWARD_OUTPUTS = ("VQ", "MQ", "TA")
# The settings of data_config that decide how a video is read, as published.
VIDEOREWARD_DATA = {
    "sample_type": "uniform",
    "prompt_template_type": "detailed_special",
    "num_frames": None,
}
HPSV3_TOKENS = ("<|Reward|>",)
HPSV3_OUTPUTS = ("mu", "sigma")
HPSV3_FILE = "HPSv3.safetensors"
EMBEDDINGS = "language_model.embed_tokens.weight"

# The normalisation of CLIP's images, and so of Qwen2-VL's.
CLIP_COLOURS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
# Frames are cut into patches of 14 x 14 pixels, merged 2 x 2.
VIDEO_MIN_PIXELS = 128 * 28 * 28
IMAGE_PIXELS = 256 * 28 * 28


@dataclass(frozen=True)
class LoadedModel:
    """A converted reward model on the CPU.

    source   The file of the weights.
    tensors  The number of tensors in it.
    merged   The number of linears whose LoRA was merged.
    """

    model: Qwen2VLRewardModel
    source: Path
    tensors: int
    merged: int


@dataclass(frozen=True)
class PublishedWeights:
    """The content of a published file of weights; rank and alpha are 0 without LoRA."""

    file: Path
    state: dict[str, Tensor]
    rank: int = 0
    alpha: float = 0.0


def read_videoreward(
    path: str | Path,
    *,
    base: str | Path,
    instruction: str | Path,
    allow_pickle: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> LoadedModel:
    """Convert VideoReward's folder.

    FileNotFoundError or ValueError name the file, and the option that would help.
    """
    config_file = Path(path) / "model_config.json"
    # The file is checked before gigabytes are read.
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file}: no such file; it belongs to VideoReward's folder"
        )
    # Read the numbers that the weights were trained with.
    config = read_json(config_file)
    try:
        data = config["data_config"]
        lora = config["peft_lora_config"]
        settings = VideoSettings(
            fps=float(data["fps"]),
            min_pixels=VIDEO_MIN_PIXELS,
            max_pixels=int(data["max_frame_pixels"]),
            **CLIP_COLOURS,
        )
        numbers = config["inference_config"]
        normal = {
            name: (float(numbers[f"{name}_mean"]), float(numbers[f"{name}_std"]))
            for name in VIDEOREWARD_OUTPUTS
        }
        rank = int(lora["lora_r"])
        alpha = float(lora["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {type(error).__name__} {error}") from error

    # Other settings would mean another way to read a video than the one implemented here.
    for key, value in VIDEOREWARD_DATA.items():
        if data.get(key, value) != value:
            raise ValueError(
                f"{config_file}: {key}={data[key]!r}, but the published VideoReward has {value!r}"
            )
    if lora.get("use_rslora"):
        raise ValueError(f"{config_file}: use_rslora is not supported")

    file = _newest_weights(Path(path))
    state = load_tensor_file(file, allow_pickle=allow_pickle)
    layout = _layout(
        instruction,
        tokens=VIDEOREWARD_TOKENS,
        outputs=VIDEOREWARD_OUTPUTS,
        media="video",
        settings=settings,
        normal=normal,
    )
    return _build(PublishedWeights(file, state, rank, alpha), base, layout, dtype)


def read_hpsv3(
    path: str | Path,
    *,
    base: str | Path,
    instruction: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> LoadedModel:
    """Convert HPSv3.safetensors, or the folder that holds it. Errors as in `read_videoreward`."""
    file = Path(path)
    if file.is_dir():
        file = file / HPSV3_FILE
    # The published file is safetensors, so no pickle is ever needed.
    state = load_tensor_file(file, allow_pickle=False)
    layout = _layout(
        instruction,
        tokens=HPSV3_TOKENS,
        outputs=HPSV3_OUTPUTS,
        media="image",
        settings=VideoSettings(
            min_pixels=IMAGE_PIXELS,
            max_pixels=IMAGE_PIXELS,
            **CLIP_COLOURS,
        ),
    )
    return _build(PublishedWeights(file, state), base, layout, dtype)


def read_instruction(path: str | Path) -> str:
    """Read an instruction and name its slot ``{text_prompt}`` or ``{prompt}`` as ours.

    ValueError, with the file's name, unless it has one slot.
    """
    text = Path(path).read_text(encoding="utf-8")
    # An instruction without the prompt, or with two, is another model's.
    count = sum(text.count(slot) for slot in SLOTS)
    if count != 1:
        raise ValueError(f"{path}: needs one slot {' or '.join(SLOTS)}, has {count}")
    for slot in SLOTS:
        text = text.replace(slot, PROMPT_SLOT)
    return text


def _layout(instruction: str | Path, **fields: Any) -> Layout:
    # An error of the text is an error of its file.
    text = read_instruction(instruction)
    try:
        return Layout(text, **fields)
    except ValueError as error:
        raise ValueError(f"{instruction}: {error}") from error


def _newest_weights(path: Path) -> Path:
    """Return the file of weights of the newest checkpoint."""
    # Compare the steps as numbers: 9 comes before 10.
    numbers = [folder.name.partition("-")[2] for folder in path.glob("checkpoint-*")]
    steps = [int(number) for number in numbers if number.isdigit()]
    if not steps:
        raise FileNotFoundError(f"{path} has no checkpoint-N")
    newest = path / f"checkpoint-{max(steps)}"
    for name in ("model.safetensors", "model.pth"):
        if (newest / name).is_file():
            return newest / name
    raise FileNotFoundError(f"{newest} has neither model.pth nor model.safetensors")


def _build(
    weights: PublishedWeights,
    base: str | Path,
    layout: Layout,
    dtype: str,
) -> LoadedModel:
    """Merge LoRA, split off the head and add the tokens; every tensor must be used."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    # A pickle may hold anything.
    file = weights.file
    state = weights.state
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{file} must hold tensors by name")

    # Merge LoRA.
    lora_state = {}
    plain = {}
    for name, value in state.items():
        if LORA_NAME.fullmatch(name):
            lora_state[name] = value
        else:
            plain[stock_name(name)] = value
    # HPSv3 was trained without LoRA.
    lora = {}
    if lora_state:
        lora = low_ranks(
            lora_state,
            LoraScales(weights.rank, weights.alpha),
            source=file,
        )
    merge_lora(plain, lora, source=file)

    # Split off the reward head, and the vocabulary's head, which is never read.
    head = take_head(plain)
    require_finite(head.state_dict(), file)
    plain.pop("lm_head.weight", None)
    backbone_state = {
        _present_name(name): value.to(getattr(torch, dtype))
        for name, value in plain.items()
    }
    if EMBEDDINGS not in backbone_state:
        raise ValueError(f"{file} lacks {EMBEDDINGS}, so it is not a Qwen2-VL")

    # The embeddings decide the size of the vocabulary.
    tokenizer = _tokenizer(base, layout.tokens)
    rows = len(backbone_state[EMBEDDINGS])
    if len(tokenizer) > rows:
        raise ValueError(
            f"{base}: the tokenizer with the reward tokens has {len(tokenizer)} entries, "
            f"but {file} has {rows} rows"
        )
    # The base's config, with the sizes that the weights have.
    config = Qwen2VLConfig.from_pretrained(Path(base).as_posix())
    config.text_config.vocab_size = rows
    settings = replace(
        layout.settings,
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
    )
    backbone = build_model(
        Qwen2VLModel,
        config,
        backbone_state,
        dtype=dtype,
        source=file,
    )
    layout = replace(layout, settings=settings)
    model = Qwen2VLRewardModel(backbone, head, tokenizer, layout)
    return LoadedModel(model.eval(), file, len(state), len(lora))


def _present_name(name: str) -> str:
    """Return the name of a weight in transformers 4.52 and later."""
    # Before 4.52 the language model had no prefix.
    name = name.removeprefix("model.")
    if name.startswith(("visual.", "language_model.")):
        return name
    return f"language_model.{name}"


def _tokenizer(base: str | Path, tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    # The base's tokenizer knows no reward tokens.
    tokenizer = AutoTokenizer.from_pretrained(Path(base).as_posix())
    # The ids follow from the order of the tokens.
    added = [
        AddedToken(
            token,
            special=True,
            normalized=False,
        )
        for token in tokens
    ]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer
