"""DeScore: a Qwen3-VL, one `<Reward>` query token, and a linear head on that token's last hidden state.

    r = w . h,   h = hidden state of `<Reward>` after the final norm, in [chat, video, CoT, <Reward>]

Attention is plain causal, so the query sees everything before it. `<Reward>` is an id without a string: a free row of
the embedding matrix whose value is a 1 x d parameter of its own, put in place by a hook. No text can spell it, the
vocabulary is never trained for it, and its optimizer state is one vector (2605.05922; spec sections 1 and 10).

A judge of K dimensions has K such tokens one after the other and a K x d head, r_k = w_k . h_k; DeScore has K = 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import require_hub_name
from common.lora import merged_backbone
from rm.config import (
    BackboneLora,
    Generation,
    LearningRates,
    RewardDimension,
    VideoSettings,
    one_reward,
)
from rm.lora import add_lora
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

PROMPT_FILE, VIDEO_FILE, DESCORE_FILE, HEAD_FILE = (
    "prompt.json",
    "video.json",
    "descore.json",
    "descore.safetensors",
)
HEAD_INIT_STD = 0.02


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences with their videos.

    ids_BL, mask_BL  long; the mask is 1 on real tokens, or bool (B, 1, L, L): which place sees which (`rm.packed`)
    position_3BL     long, M-RoPE rows (time, height, width), given explicitly: the backbone keeps position state
                     between calls otherwise
    last_B           index of each row's last real token
    patches          (n, C*tp*p*p) fp32, all videos one after the other; grid_B3 long
    """

    ids_BL: Tensor
    mask_BL: Tensor
    position_3BL: Tensor
    last_B: Tensor
    patches: Tensor
    grid_B3: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)}
        )


class Head(nn.Linear):
    """w_k . h_k in fp32, whatever the dtype of w and of the backbone: (..., K, D) -> (..., K)."""

    def forward(self, hidden_BKD: Tensor) -> Tensor:
        return (hidden_BKD.float() * self.weight.float()).sum(-1)


class DeScore(nn.Module):
    """The module deepspeed wraps. Beside its weights it holds all that belongs to the checkpoint.

    tokenizer, template, settings  how prompts and videos become a Batch
    query_id                       the id of `<Reward>`; of several, the first
    dimensions                     what each query token rewards, in their order
    generation                     how its chains of thought are meant to be written
    sharded                        every rank holds a piece of the weights only (ZeRO 3): all must call equally often
    """

    sharded = False

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
        self.dimensions = dict(dimensions or one_reward())
        vision = backbone.config.vision_config
        for ours in ("patch_size", "merge_size", "temporal_patch_size"):
            theirs = "spatial_merge_size" if ours == "merge_size" else ours
            if getattr(settings, ours) != getattr(vision, theirs):
                got, want = getattr(settings, ours), getattr(vision, theirs)
                raise ValueError(
                    f"VideoSettings.{ours}={got}, but the vision tower's is {want}"
                )
        self.backbone = backbone
        self.tokenizer, self.template, self.settings, self.query_id = (
            tokenizer,
            template,
            settings,
            query_id,
        )
        self.generation = generation or Generation()
        self.pad_id = _pad_id(tokenizer)
        self.video_pad_id, self.end_id = (
            token_id(tokenizer, VIDEO_PAD),
            token_id(tokenizer, IM_END),
        )
        rows = backbone.get_input_embeddings().weight
        width = rows.shape[1]
        count = len(self.dimensions)
        self.query = nn.Parameter(
            rows[:query_id].detach().float().mean(0, keepdim=True).repeat(count, 1)
        )
        self.head = Head(width, count, bias=False, device=rows.device)
        nn.init.normal_(self.head.weight, std=HEAD_INIT_STD)
        backbone.get_input_embeddings().register_forward_hook(self._place_query)

    def _place_query(
        self, module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor
    ) -> Tensor:
        which_BLK = args[0].unsqueeze(-1) == torch.tensor(
            self.query_ids, device=embedded.device
        )
        own_BLD = which_BLK.to(embedded.dtype) @ self.query.to(embedded.dtype)
        return torch.where(which_BLK.any(-1, keepdim=True), own_BLD, embedded)

    # ------------------------------------------------------------------ the reward

    def forward(self, batch: Batch) -> Tensor:
        """Rewards (B, K), fp32, of sequences that end in the query tokens. No vocabulary logits are computed."""
        hidden_BLD = self.hidden(batch)
        row_B1 = torch.arange(len(hidden_BLD), device=hidden_BLD.device).unsqueeze(1)
        return self.read_reward(
            hidden_BLD[row_B1, batch.last_B.unsqueeze(1) - self.steps_back]
        )

    def hidden(self, batch: Batch, **options: Any) -> Tensor:
        """Last hidden state (B, L, D) after the final norm; ``options`` go to the backbone (a KV cache, say)."""
        output = self.backbone.model(
            input_ids=batch.ids_BL,
            attention_mask=batch.mask_BL,
            position_ids=batch.position_3BL,
            pixel_values_videos=batch.patches,
            video_grid_thw=batch.grid_B3,
            mm_token_type_ids=(batch.ids_BL == self.video_pad_id).int()
            * 2,  # 0 text, 2 video
            **options,
        )
        return output.last_hidden_state

    def read_reward(self, hidden_BKD: Tensor) -> Tensor:
        """r_k = w_k . h_k in fp32, whatever the backbone's dtype: (..., K, D) -> (..., K)."""
        return self.head(hidden_BKD)

    def total(self, reward_BK: Tensor) -> Tensor:
        """The reward: SUM over dimensions of weight x reward, (..., K) -> (...)."""
        weights = [dimension.weight for dimension in self.dimensions.values()]
        return reward_BK @ torch.tensor(
            weights, dtype=reward_BK.dtype, device=reward_BK.device
        )

    @property
    def loss_weight_K(self) -> list[float]:
        return [dimension.loss_weight for dimension in self.dimensions.values()]

    @property
    def query_ids(self) -> tuple[int, ...]:
        return tuple(range(self.query_id, self.query_id + len(self.dimensions)))

    @property
    def steps_back(self) -> Tensor:
        """(K,) how far each query stands before the last one."""
        return torch.arange(len(self.dimensions) - 1, -1, -1, device=self.device)

    # ------------------------------------------------------------------ from texts and videos to a Batch

    def encode(
        self, prompt: str, video: PreparedVideo, cot: str | None = None
    ) -> Encoded:
        """Token ids of one judged video in this checkpoint's template."""
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
        """Pad on the right; ``query`` appends the query tokens to every sequence (off for generation). On the CPU."""
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
        grid_B3 = torch.tensor([video.grid for video in videos])
        return Batch(
            ids_BL=ids_BL,
            mask_BL=(torch.arange(ids_BL.shape[1]) < lengths_B.unsqueeze(1)).long(),
            position_3BL=rope_positions(
                ids_BL == self.video_pad_id, grid_B3, self.settings.merge_size
            ),
            last_B=lengths_B - 1,
            patches=torch.cat([video.patches for video in videos]),
            grid_B3=grid_B3,
        )

    def banned_ids(self) -> Tensor:
        """Bool (V,): ids that must not be sampled - `<Reward>`, the untrained free rows, and visual placeholders."""
        banned_V = torch.zeros(
            self.backbone.get_output_embeddings().out_features, dtype=torch.bool
        )
        banned_V[_first_free_id(self.tokenizer) :] = True
        config = self.backbone.config
        banned_V[[*self.query_ids, config.video_token_id, config.image_token_id]] = True
        return banned_V

    @property
    def device(self) -> torch.device:
        return self.query.device

    # ------------------------------------------------------------------ folders

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
        """A new judge on a Qwen3-VL, a folder or a hub name. ``seed`` decides the head's weights.

        Template and settings: what is given, else ``prompt.json`` and ``video.json`` in the folder, else the defaults.
        """
        path = Path(path)
        backbone, tokenizer = _load_backbone(path, dtype)
        if template is None:
            template = (
                PromptTemplate.load(path / PROMPT_FILE)
                if (path / PROMPT_FILE).is_file()
                else DEFAULT_TEMPLATE
            )
        if settings is None:
            settings = (
                VideoSettings.load(path / VIDEO_FILE)
                if (path / VIDEO_FILE).is_file()
                else VideoSettings()
            )
        query_id = _first_free_id(tokenizer)
        needed = query_id + len(dimensions or one_reward())
        if needed > backbone.get_input_embeddings().weight.shape[0]:
            # too few free rows: grow to the next multiple of 64, odd sizes are slow and fragile on GPUs
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
        """Write the whole judge; `load` needs nothing else. LoRA is merged: the folder is a stock Qwen3-VL as well.

        ``state_dict`` replaces this module's own (weights gathered by ZeRO-3, or fp32 masters).
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        dtype = self.backbone.get_input_embeddings().weight.dtype
        self.backbone.save_pretrained(
            path, state_dict=merged_backbone(self.backbone, state, dtype)
        )
        self.tokenizer.save_pretrained(path)
        self.template.save(path / PROMPT_FILE)
        self.settings.save(path / VIDEO_FILE)
        own = {"query": state["query"], "head": state["head.weight"]}
        save_file(
            {
                name: tensor.detach().float().cpu().contiguous()
                for name, tensor in own.items()
            },
            path / HEAD_FILE,
        )
        dimensions = {
            name: asdict(dimension) for name, dimension in self.dimensions.items()
        }
        record = {
            "format": 1, "query_id": self.query_id, "generation": asdict(self.generation), "dimensions": dimensions
        }  # fmt: skip
        (path / DESCORE_FILE).write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> DeScore:
        """Read what `save` wrote, in eval mode. FileNotFoundError or ValueError name what is missing."""
        from safetensors.torch import load_file

        path = Path(path)
        missing = [
            n
            for n in (DESCORE_FILE, HEAD_FILE, PROMPT_FILE, VIDEO_FILE)
            if not (path / n).is_file()
        ]
        if missing:
            raise FileNotFoundError(
                f"{path} is not a DeScore checkpoint: it lacks {', '.join(missing)}"
            )
        record = json.loads((path / DESCORE_FILE).read_text(encoding="utf-8"))
        if record.get("format") != 1:
            raise ValueError(
                f"{path / DESCORE_FILE}: format {record.get('format')!r}, this version reads 1"
            )
        backbone, tokenizer = _load_backbone(path, dtype)
        template, settings = (
            PromptTemplate.load(path / PROMPT_FILE),
            VideoSettings.load(path / VIDEO_FILE),
        )
        dimensions = {
            name: RewardDimension(**given)
            for name, given in record.get("dimensions", {}).items()
        }
        how = Generation(**record["generation"])
        model = cls(
            backbone, tokenizer, template, settings, record["query_id"], how, dimensions
        )
        own = load_file(path / HEAD_FILE)
        model.load_state_dict(
            {"query": own["query"], "head.weight": own["head"]}, strict=False
        )
        return model.eval()

    @staticmethod
    def dimensions_in(path: str | Path) -> list[str]:
        """The dimensions of a folder's checkpoint, which is not loaded. ValueError, naming the file, if unreadable."""
        file = Path(path) / DESCORE_FILE
        try:
            return list(
                json.loads(file.read_text(encoding="utf-8")).get(
                    "dimensions", one_reward()
                )
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} is not the record of a DeScore ({error})"
            ) from error

    # ------------------------------------------------------------------ what is trained

    def param_groups(
        self,
        lr: LearningRates,
        *,
        lora: BackboneLora | None,
        weight_decay: float,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Freeze everything, then free and group what has a learning rate; groups carry ``name``.

        lora  adapters on the language model's linears (added here, once); None trains those layers whole. The
              vocabulary matrices stay frozen either way. A rate of 0 freezes the part.
        seed  decides the adapters' first values
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
        return [
            {
                "name": part,
                "params": parameters,
                "lr": getattr(lr, part),
                "weight_decay": _decay(part, weight_decay),
            }
            for part, parameters in parts.items()
            if parameters
        ]


def rope_positions(is_video_BL: Tensor, grid_B3: Tensor, merge_size: int) -> Tensor:
    """M-RoPE positions (3, B, L) of sequences with one video each, equal to Qwen3-VL's ``get_rope_index``.

    Text advances all three rows by one. The pads of one temporal patch, placed at s, get (s, s + row, s + column),
    and what follows goes on at s + max(rows, columns): frames are told apart by their timestamps, not by position.
    """
    rows_B1, columns_B1 = (grid_B3[:, 1:] // merge_size).unsqueeze(-1).unbind(1)
    is_video = is_video_BL.long()
    first = is_video * (1 - F.pad(is_video, (1, -1)))
    frame_BL = first.cumsum(1)
    text_BL = (1 - is_video).cumsum(1) - (1 - is_video)  # text tokens before this one
    span_B1 = torch.maximum(rows_B1, columns_B1)
    start_BL = text_BL + span_B1 * (frame_BL - is_video)
    pad_BL = (is_video.cumsum(1) - 1) % (rows_B1 * columns_B1)
    offsets = (torch.zeros_like(pad_BL), pad_BL // columns_B1, pad_BL % columns_B1)
    return torch.stack([start_BL + is_video * offset for offset in offsets])


def _part_of(name: str, *, with_lora: bool) -> str | None:
    """Which learning rate a parameter has; None for the vocabulary matrices and the layers under LoRA."""
    if name == "query":
        return "query"
    if name.startswith("head."):
        return "head"
    if ".visual." in name:
        return "merger" if "merger" in name else "vision"
    if "embed_tokens" in name or "lm_head" in name:
        return None
    return "llm" if ("lora_" in name) == with_lora else None


def _decay(part: str, weight_decay: float) -> float:
    return (
        0.0 if part == "query" else weight_decay
    )  # decay would pull the query off the embeddings' scale


def _load_backbone(
    path: Path, dtype: torch.dtype
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    if not path.is_dir():
        require_hub_name(path.as_posix(), "config.json")
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it lacks config.json")
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(
        path.as_posix(), dtype=dtype
    )
    return backbone, AutoTokenizer.from_pretrained(path.as_posix())


def _first_free_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token")
    return tokenizer.pad_token_id
