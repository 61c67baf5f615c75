"""DeScore, a video reward model that thinks before it scores (arXiv 2605.05922).

A Qwen3-VL reads the chat, the video and a chain of thought (CoT). The query token `<Reward>`
follows, and a linear head on its last hidden state gives the reward:

    [prompt, video, CoT, <Reward>]  ->  h = hidden state of <Reward>  ->  r = w . h

Attention is causal, so the query sees everything before it. `<Reward>` is an id without a
string: an unused row of the embedding matrix, whose value is a (1, D) parameter that a hook
puts in place. So no text can spell it, the vocabulary is never trained for it, and its
optimizer state is a single vector.

A reward model of K dimensions has K query tokens in a row and a (K, D) head with
r_k = w_k . h_k. DeScore has K = 1. The forward is `DeScore.forward`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import (
    TRANSFORMERS_PATTERNS,
    give_usual_mode,
    model_folder,
    read_json,
)
from common.state_dicts import raise_problems, shapes_in, state_dict_problems
from common.strict_loading import (
    errors_of,
    load_pretrained,
    require_finite,
    require_floats,
)
from common.weight_files import load_safetensors
from rm.config import (
    BackboneLora,
    CotInTraining,
    Generation,
    LearningRates,
    RewardDimension,
    VideoSettings,
    one_reward,
)
from rm.lora import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    add_lora,
    apply_adapter,
    is_adapter,
    read_peft_adapter,
    save_adapter,
    split_state,
)
from rm.prompt import (
    DEFAULT_TEMPLATE,
    IM_END,
    VIDEO_PAD,
    Encoded,
    PromptTemplate,
    encode,
    token_id,
)
from rm.video import PreparedVideo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

# The files of a checkpoint, beside those of a stock Qwen3-VL.
PROMPT_FILE = "prompt.json"
VIDEO_FILE = "video.json"
DESCORE_FILE = "descore.json"
HEAD_FILE = "descore.safetensors"
HEAD_INIT_STD = 0.02


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences with a video each.

    ids_BL        Token ids, long.
    mask_BL       long, 1 on real tokens; or a mask of `rm.block_attention`.
    position_3BL  M-RoPE positions (time, height, width), long. They are given explicitly
                  because the backbone otherwise keeps position state between calls.
    last_B        The index of each row's last real token.
    patches       The patches (n, C*tp*p*p) of all videos, concatenated, fp32.
    grid_B3       The patch grid (t, h, w) of each video, long.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    position_3BL: Tensor
    last_B: Tensor
    patches: Tensor
    grid_B3: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved)


class Head(nn.Linear):
    """Row-wise linear head r_k = w_k . h_k in fp32: (..., K, D) -> (..., K)."""

    def forward(self, hidden_BKD: Tensor) -> Tensor:
        return (hidden_BKD.float() * self.weight.float()).sum(-1)


class DeScore(nn.Module):
    """The reward model: a Qwen3-VL backbone, K query tokens and a linear head.

    It also holds everything else that belongs to a checkpoint.

    tokenizer, template, settings  They turn prompts and videos into a `Batch`.
    query_id    The id of `<Reward>`; of several query tokens, the first.
    dimensions  The meaning of each query token, in their order.
    generation  How the model's CoTs are meant to be generated.
    sharded     True if every rank holds only a piece of the weights (ZeRO 3); then all ranks
                must call the model equally often.
    cot_in_training  Whether it was trained with CoTs, None if nothing says so.
    """

    sharded = False
    cot_in_training: CotInTraining | None = None

    def __init__(
        self,
        backbone: Qwen3VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        settings: VideoSettings,
        query_id: int,
        generation: Generation | None = None,
        dimensions: Mapping[str, RewardDimension] | None = None,
    ) -> None:
        super().__init__()
        _require_same_patches(settings, backbone.config.vision_config)
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.query_id = query_id
        self.generation = generation or Generation()
        self.dimensions = dict(dimensions or one_reward())
        self.pad_id = tokenizer.pad_token_id
        self.video_pad_id = token_id(tokenizer, VIDEO_PAD)
        self.end_id = token_id(tokenizer, IM_END)

        # The query starts at the mean embedding, the head at small random numbers.
        embeddings = backbone.get_input_embeddings()
        rows = embeddings.weight
        width = rows.shape[1]
        count = len(self.dimensions)
        mean = rows[:query_id].detach().float().mean(0, keepdim=True)
        self.query = nn.Parameter(mean.repeat(count, 1))
        self.head = Head(width, count, bias=False, device=rows.device)
        nn.init.normal_(self.head.weight, std=HEAD_INIT_STD)
        # On the device once and for all: a forward must not wait for a copy from the host.
        query_id_K = torch.tensor(self.query_ids, device=rows.device)
        self.register_buffer("query_id_K", query_id_K, persistent=False)
        embeddings.register_forward_hook(self._place_query)

    # ------------------------------------------------------------------ the forward

    def forward(self, batch: Batch) -> Tensor:
        """Compute rewards (B, K) in fp32 of sequences that end in the query tokens.

        [prompt, video, CoT, <Reward>] -> hidden state of <Reward> -> linear head -> reward.
        No vocabulary logits are computed.
        """
        # 1. One causal forward: ids (B, L) and patches -> last hidden states (B, L, D).
        hidden_BLD = self.hidden(batch)

        # 2. Take the hidden states of the K query tokens, the last K tokens of each row.
        row_B1 = torch.arange(len(hidden_BLD), device=hidden_BLD.device).unsqueeze(1)
        query_BK = batch.last_B.unsqueeze(1) - self.query_offset_K
        hidden_BKD = hidden_BLD[row_B1, query_BK]

        # 3. Linear head: r_k = w_k . h_k.
        return self.reward_from_hidden(hidden_BKD)

    def hidden(self, batch: Batch, **options: Any) -> Tensor:
        """Compute last hidden states (B, L, D) after the final norm.

        ``options`` go to the backbone, for example a KV cache.
        """
        is_video_BL = batch.ids_BL == self.video_pad_id
        output = self.backbone.model(
            input_ids=batch.ids_BL,
            attention_mask=batch.mask_BL,
            position_ids=batch.position_3BL,
            pixel_values_videos=batch.patches,
            video_grid_thw=batch.grid_B3,
            mm_token_type_ids=is_video_BL.int() * 2,  # 0 is text, 2 is video
            **options,
        )
        return output.last_hidden_state

    def _place_query(
        self, module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor
    ) -> Tensor:
        """Embedding hook: replace the embeddings of the query tokens by the trained ones."""
        is_query_BLK = args[0].unsqueeze(-1) == self.query_id_K
        query_BLD = is_query_BLK.to(embedded.dtype) @ self.query.to(embedded.dtype)
        return torch.where(is_query_BLK.any(-1, keepdim=True), query_BLD, embedded)

    def reward_from_hidden(self, hidden_BKD: Tensor) -> Tensor:
        """Linear head r_k = w_k . h_k in fp32: (..., K, D) -> (..., K)."""
        return self.head(hidden_BKD)

    def total(self, reward_BK: Tensor) -> Tensor:
        """SUM over dimensions of weight x reward: (..., K) -> (...)."""
        weights = [dimension.weight for dimension in self.dimensions.values()]
        weight_K = torch.tensor(weights, dtype=reward_BK.dtype, device=reward_BK.device)
        return reward_BK @ weight_K

    @property
    def loss_weight_K(self) -> list[float]:
        return [dimension.loss_weight for dimension in self.dimensions.values()]

    @property
    def query_ids(self) -> tuple[int, ...]:
        return tuple(range(self.query_id, self.query_id + len(self.dimensions)))

    @property
    def query_offset_K(self) -> Tensor:
        """How many tokens each query stands before the last one, (K,)."""
        return torch.arange(len(self.dimensions) - 1, -1, -1, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.query.device

    # ------------------------------------------------------------------ inputs

    def encode(
        self, prompt: str, video: PreparedVideo, cot: str | None = None
    ) -> Encoded:
        """Token ids of a prompt, a video and a CoT in this checkpoint's template."""
        return encode(
            self.tokenizer,
            self.template,
            prompt,
            video.grid,
            video.times,
            cot,
            merge_size=self.settings.merge_size,
        )

    def batch(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        *,
        query: bool = True,
    ) -> Batch:
        """Pad sequences on the right and append the query tokens to each, on the CPU.

        ``query=False`` leaves out the query tokens, for generation.
        """
        if len(encoded) != len(videos) or not encoded:
            raise ValueError(
                f"DeScore.batch: {len(encoded)} sequences for {len(videos)} videos"
            )
        tail = self.query_ids if query else ()
        sequences = [torch.tensor(item.ids + tail) for item in encoded]
        lengths_B = torch.tensor([len(ids) for ids in sequences])
        ids_BL = nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=self.pad_id
        )
        is_token_BL = torch.arange(ids_BL.shape[1]) < lengths_B.unsqueeze(1)
        grid_B3 = torch.tensor([video.grid for video in videos])
        is_video_BL = ids_BL == self.video_pad_id
        return Batch(
            ids_BL=ids_BL,
            mask_BL=is_token_BL.long(),
            position_3BL=rope_positions(is_video_BL, grid_B3, self.settings.merge_size),
            last_B=lengths_B - 1,
            patches=torch.cat([video.patches for video in videos]),
            grid_B3=grid_B3,
        )

    def banned_ids(self) -> Tensor:
        """Mask (V,), True for ids that must never be sampled.

        They are `<Reward>`, the untrained rows of the vocabulary, and visual placeholders.
        """
        vocabulary = self.backbone.get_output_embeddings().out_features
        config = self.backbone.config
        banned_V = torch.zeros(vocabulary, dtype=torch.bool)
        banned_V[_first_free_id(self.tokenizer) :] = True
        banned_V[[*self.query_ids, config.video_token_id, config.image_token_id]] = True
        return banned_V

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def from_base(
        cls,
        path: str | Path,
        *,
        template: PromptTemplate | None = None,
        settings: VideoSettings | None = None,
        generation: Generation | None = None,
        dimensions: Mapping[str, RewardDimension] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> DeScore:
        """Make an untrained reward model from a Qwen3-VL, a folder or a hub name.

        Template and settings default to ``prompt.json`` and ``video.json`` in the folder, and
        without these files to DeScore's. ``seed`` decides the first weights of the head.
        """
        path = Path(path)
        backbone, tokenizer = _load_backbone(path, dtype)
        if template is None:
            template = DEFAULT_TEMPLATE
            if (path / PROMPT_FILE).is_file():
                template = PromptTemplate.load(path / PROMPT_FILE)
        if settings is None:
            settings = VideoSettings()
            if (path / VIDEO_FILE).is_file():
                settings = VideoSettings.load(path / VIDEO_FILE)

        # Too few free rows: grow to a multiple of 64, odd sizes are slow and fragile on GPUs.
        query_id = _first_free_id(tokenizer)
        needed = query_id + len(dimensions or one_reward())
        if needed > backbone.get_input_embeddings().weight.shape[0]:
            backbone.resize_token_embeddings(
                needed, pad_to_multiple_of=64, mean_resizing=False
            )

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(
                backbone,
                tokenizer,
                template,
                settings,
                query_id,
                generation,
                dimensions,
            )

    def save(
        self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a checkpoint that `load` reads; nothing else is needed.

        The folder is a stock Qwen3-VL as well. LoRA is merged into an fp32 backbone. A bfloat16
        backbone would round it away, so there it lies beside the untouched weights (`rm.lora`).
        ``state_dict`` replaces this module's weights, for example by weights gathered by ZeRO 3
        or fp32 masters.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state_dict is None else state_dict)

        # The stock part: backbone, tokenizer, prompt, video settings.
        dtype = self.backbone.get_input_embeddings().weight.dtype
        weights, adapter = split_state(self.backbone, state)
        if dtype == torch.float32:
            for name, pair in adapter.items():
                weights[name] = weights[name].float() + pair.change()
            adapter = {}
        save_adapter(path, adapter)
        stock = {name: w.detach().to(dtype).cpu() for name, w in weights.items()}
        self.backbone.save_pretrained(path, state_dict=stock)
        self.tokenizer.save_pretrained(path)
        self.template.save(path / PROMPT_FILE)
        self.settings.save(path / VIDEO_FILE)

        # Query and head, in fp32.
        tensors = {}
        for name, key in (("query", "query"), ("head", "head.weight")):
            tensors[name] = state[key].detach().float().cpu().contiguous()
        save_file(tensors, path / HEAD_FILE)
        give_usual_mode(path)
        record = {
            "format": 1,
            "query_id": self.query_id,
            "generation": asdict(self.generation),
            "dimensions": {name: asdict(d) for name, d in self.dimensions.items()},
            "cot_in_training": self.cot_in_training,
        }
        text = json.dumps(record, indent=1) + "\n"
        (path / DESCORE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> DeScore:
        """Read a checkpoint that `save` wrote, in eval mode.

        Raises FileNotFoundError, naming the files, if some are missing, and ValueError, naming
        file and tensor, for another format or weights that do not fit.
        """
        path = Path(path)
        required = (DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE)
        missing = [name for name in required if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} is not a DeScore checkpoint: it lacks {', '.join(missing)}"
            )
        record = read_json(path / DESCORE_FILE)
        found = record.get("format") if isinstance(record, dict) else None
        if found != 1:
            raise ValueError(
                f"{path / DESCORE_FILE}: format {found!r}, this version reads 1"
            )
        backbone, tokenizer = _load_backbone(path, dtype)
        with errors_of(path / DESCORE_FILE, "record of a DeScore"):
            dimensions = {}
            for name, values in record.get("dimensions", {}).items():
                dimensions[name] = RewardDimension(**values)
            query_id = record["query_id"]
            generation = Generation(**record["generation"])
        rows = len(backbone.get_input_embeddings().weight)
        if type(query_id) is not int or not 0 <= query_id < rows:
            raise ValueError(
                f"{path / DESCORE_FILE}: query_id is {query_id!r}, want an id below {rows}"
            )
        model = cls(
            backbone,
            tokenizer,
            PromptTemplate.load(path / PROMPT_FILE),
            VideoSettings.load(path / VIDEO_FILE),
            query_id,
            generation,
            dimensions,
        )
        model.load_head(load_safetensors(path / HEAD_FILE), path / HEAD_FILE)
        model.cot_in_training = DeScore.cot_in_training_of(path)
        return model.eval()

    @torch.no_grad()
    def load_head(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Copy the query and the head of a file into the model.

        Raises ValueError, naming ``source``, for other names or shapes and for NaN or infinity.
        """
        own = {"query": self.query, "head": self.head.weight}
        problems = state_dict_problems(shapes_in(tensors), shapes_in(own))
        raise_problems(problems, f"{source} does not fit {DESCORE_FILE}")
        require_floats(tensors, source)
        require_finite(tensors, source)
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    @staticmethod
    def dimensions_in(path: str | Path) -> list[str]:
        """Names of the dimensions of a checkpoint, without loading it.

        Raises ValueError, naming the file, if it cannot be read.
        """
        return list(_record_of(path).get("dimensions", one_reward()))

    @staticmethod
    def cot_in_training_of(path: str | Path) -> CotInTraining | None:
        """Whether a checkpoint was trained with CoTs; None if it does not say so.

        Raises ValueError, naming the file, if it cannot be read or holds another word.
        """
        word = _record_of(path).get("cot_in_training")
        if word not in (None, *get_args(CotInTraining)):
            raise ValueError(
                f"{Path(path) / DESCORE_FILE}: cot_in_training is {word!r}, "
                f"want one of {', '.join(get_args(CotInTraining))}"
            )
        return word

    # ------------------------------------------------------------------ training

    def param_groups(
        self,
        lr: LearningRates,
        *,
        lora: BackboneLora | None,
        weight_decay: float,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Freeze everything, then free and group the parts that have a learning rate.

        lora  Adds adapters to the language model's linears; call it once. None trains these
              layers in full. The vocabulary matrices stay frozen in any case.
        seed  Decides the adapters' first values.

        A rate of 0 freezes the part. Every group carries the part's name as ``name``.
        """
        if lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_lora(self.backbone, lora)
        parts: dict[str, list[nn.Parameter]] = {f.name: [] for f in fields(lr)}
        for name, parameter in self.named_parameters():
            part = _part_of(name, with_lora=lora is not None)
            parameter.requires_grad_(part is not None and getattr(lr, part) > 0)
            if parameter.requires_grad:
                parts[part].append(parameter)

        groups = []
        for part, parameters in parts.items():
            if parameters:
                # Decay would pull the query off the scale of the embeddings.
                decay = 0.0 if part == "query" else weight_decay
                group = {"name": part, "params": parameters, "lr": getattr(lr, part)}
                groups.append({**group, "weight_decay": decay})
        return groups


def rope_positions(is_video_BL: Tensor, grid_B3: Tensor, merge_size: int) -> Tensor:
    """M-RoPE positions (3, B, L) of sequences with a video each.

    Equal to ``get_rope_index`` of Qwen3-VL. Text advances all three rows by 1. The pads of a
    temporal patch that starts at position s get (s, s + row, s + column), and the next token
    s + max(rows, columns). Timestamps tell frames apart, not positions.
    """
    rows_B1, columns_B1 = (grid_B3[:, 1:] // merge_size).unsqueeze(-1).unbind(1)
    is_video = is_video_BL.long()
    is_text = 1 - is_video

    # Start of the frame a token belongs to: text tokens and frames before it.
    is_first = is_video * (1 - F.pad(is_video, (1, -1)))
    frame_BL = is_first.cumsum(1)
    text_before_BL = is_text.cumsum(1) - is_text
    span_B1 = torch.maximum(rows_B1, columns_B1)
    start_BL = text_before_BL + span_B1 * (frame_BL - is_video)

    # Row and column of a pad within its frame.
    pad_BL = (is_video.cumsum(1) - 1) % (rows_B1 * columns_B1)
    offsets = (torch.zeros_like(pad_BL), pad_BL // columns_B1, pad_BL % columns_B1)
    return torch.stack([start_BL + is_video * offset for offset in offsets])


def _part_of(name: str, *, with_lora: bool) -> str | None:
    """The learning rate of a parameter; None if it is never trained.

    Those are the vocabulary matrices, a checkpoint's adapter and, with LoRA, the layers under it.
    """
    if name == "query":
        return "query"
    if name.startswith("head."):
        return "head"
    if ".visual." in name:
        return "merger" if "merger" in name else "vision"
    if "embed_tokens" in name or "lm_head" in name:
        return None
    if with_lora:
        return "llm" if ".lora_" in name else None
    return None if is_adapter(name) else "llm"


def _require_same_patches(settings: VideoSettings, vision_config: Any) -> None:
    """Raise ValueError if videos are cut differently from what the vision tower reads."""
    expected = {
        "patch_size": vision_config.patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
    }
    for name, value in expected.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"VideoSettings.{name}={getattr(settings, name)}, "
                f"but the vision tower has {value}"
            )


def _record_of(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's descore.json. Raises ValueError, naming the file, if that fails."""
    file = Path(path) / DESCORE_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not the record of a DeScore ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is not the record of a DeScore")
    return record


def _load_backbone(
    path: Path, dtype: torch.dtype
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    folder = model_folder(path, "config.json", patterns=TRANSFORMERS_PATTERNS)
    # transformers would put the adapter into peft's layers, where stage 2 puts its own.
    adapter_file = folder / ADAPTER_CONFIG
    options = {}
    if (folder / ADAPTER_FILE).is_file() and not adapter_file.is_file():
        raise FileNotFoundError(
            f"{adapter_file} is missing: {ADAPTER_FILE} belongs to it"
        )
    if adapter_file.is_file():
        options = {"adapter_kwargs": {"subfolder": "none"}}
    backbone = load_pretrained(
        Qwen3VLForConditionalGeneration, folder, dtype=dtype, **options
    )
    if options:
        apply_adapter(backbone, read_peft_adapter(folder), adapter_file)
    with errors_of(folder, "tokenizer"):
        return backbone, AutoTokenizer.from_pretrained(folder.as_posix())


def _first_free_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1
