"""Judges that read rewards off special tokens of a Qwen2-VL: VideoReward (2501.13918) and HPSv3 (2508.03789).

Both see one sequence, and no chain of thought::

    <|im_start|>system NEWLINE You are a helpful assistant.<|im_end|> NEWLINE
    <|im_start|>user NEWLINE <|vision_start|>{pads}<|vision_end|>{instruction}<|im_end|> NEWLINE
    <|im_start|>assistant NEWLINE

The instruction holds the prompt and the reward tokens; the head reads the last hidden state at each of those. Positions
are 0, 1, 2, ... for every token, those of the picture too: the released code gives the language model embeddings and
neither ids nor positions, and then transformers counts (4.45, VideoReward's pin, never computes M-RoPE there). A port
that lets Qwen2-VL place the picture in three dimensions asks the weights a question they were not trained on.

`rm.baselines.load_published` reads the published checkpoints into a folder of ours, which `Qwen2VLRewardModel.load` reads.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from common.memory import AdaptiveBatcher
from rm.config import VideoSettings
from rm.convert.weights import exactly, load_safetensors
from rm.prompt import (
    IM_END,
    IM_START,
    PROMPT_SLOT,
    VISION_END,
    VISION_START,
    encode_text,
    token_id,
)
from rm.video import PixelPatches, preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLModel

LAYOUT, WEIGHTS, HEAD = "judge.json", "model.safetensors", "rm_head."
SYSTEM = "You are a helpful assistant."
PADS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}


@dataclass(frozen=True)
class Layout:
    """What a judge is beside weights, config and tokenizer; saved as judge.json.

    instruction  text behind the picture, with one ``{prompt}`` and every reward token once, in the order of ``tokens``
    tokens       reward tokens
    outputs      a name for every number: one per token, or, where there is one token, one per output of the head
    media        whether a picture is a whole video or one image
    settings     how frames become patches, and how many of a video are seen
    normal       name -> (mean, std): that number is given as (x - mean) / std
    """

    instruction: str
    tokens: tuple[str, ...]
    outputs: tuple[str, ...]
    media: Literal["video", "image"]
    settings: VideoSettings
    normal: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in (PROMPT_SLOT, *self.tokens):
            if (found := self.instruction.count(part)) != 1:
                raise ValueError(
                    f"the instruction must hold {part} exactly once, found {found}"
                )
        places = [self.instruction.index(token) for token in self.tokens]
        if places != sorted(places):
            raise ValueError(
                f"the instruction must hold {', '.join(self.tokens)} in this order"
            )
        if self.media not in PADS:
            raise ValueError(f"media={self.media!r} must be 'video' or 'image'")
        if unknown := set(self.normal) - set(self.outputs):
            raise ValueError(
                f"normal names {sorted(unknown)}, but the outputs are {', '.join(self.outputs)}"
            )
        if bad := [name for name, (_, std) in self.normal.items() if not std > 0]:
            raise ValueError(f"normal: the std of {bad[0]} must be positive")

    def save(self, path: Path) -> None:
        path.write_text(
            json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: Path) -> Layout:
        """FileNotFoundError or ValueError with the file's name."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; launch/convert_reward.py writes such a folder"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            raw["settings"] = VideoSettings(**raw["settings"])
            raw["normal"] = {name: tuple(pair) for name, pair in raw["normal"].items()}
            return cls(
                **{
                    **raw,
                    "tokens": tuple(raw["tokens"]),
                    "outputs": tuple(raw["outputs"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


class Qwen2VLRewardModel(nn.Module):
    """Backbone without its vocabulary head, and the reward head in fp32, whatever the backbone's dtype."""

    def __init__(
        self,
        backbone: Qwen2VLModel,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.tokenizer, self.layout = (
            backbone,
            head.float(),
            tokenizer,
            layout,
        )
        self.reward_ids = [token_id(tokenizer, token) for token in layout.tokens]

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | None = None, dtype: str = "float32"
    ) -> Qwen2VLRewardModel:
        """A folder that `save` wrote. FileNotFoundError or ValueError name the file."""
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        folder = Path(folder)
        layout = Layout.load(folder / LAYOUT)
        state = load_safetensors(folder / WEIGHTS)
        head = head_of(
            {
                name.removeprefix(HEAD): state.pop(name)
                for name in list(state)
                if name.startswith(HEAD)
            }
        )
        config = Qwen2VLConfig.from_pretrained(folder.as_posix())
        backbone = exactly(Qwen2VLModel, config, state, dtype=dtype, source=folder)
        tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())
        judge = (
            cls(backbone, head, tokenizer, layout)
            .requires_grad_(requires_grad=False)
            .eval()
        )
        return judge.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def save(self, folder: str | Path) -> None:
        """Into one folder: config.json, the tokenizer, judge.json and, last, model.safetensors."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.layout.save(folder / LAYOUT)
        state = dict(self.backbone.state_dict())
        state |= {
            HEAD + name: tensor for name, tensor in self.head.state_dict().items()
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / WEIGHTS,
        )

    def encode(self, prompt: str, grid: Sequence[int]) -> list[int]:
        """Ids of the sequence around a picture of (t, h, w) patches. A prompt cannot spell a control token."""
        pads = math.prod(grid) // self.layout.settings.merge_size**2
        picture = [token_id(self.tokenizer, PADS[self.layout.media])] * pads
        return chat(
            self.tokenizer,
            picture,
            self.layout.instruction,
            prompt,
            tokens=self.layout.tokens,
        )

    @torch.no_grad()
    def read(self, pictures: Sequence[PixelPatches], prompt: str) -> Tensor:
        """(N, K) fp32 on the CPU: the layout's outputs, normalised, of N pictures of one size under one prompt."""
        grid = pictures[0].grid
        if any(picture.grid != grid for picture in pictures):
            raise ValueError(
                f"pictures of one batch must have one size, got {sorted({p.grid for p in pictures})}"
            )
        device = next(self.backbone.parameters()).device
        ids_L = torch.tensor(self.encode(prompt, grid))
        ids_NL = ids_L.expand(len(pictures), -1).to(device)
        kind = "pixel_values_videos" if self.layout.media == "video" else "pixel_values"
        patches = torch.cat([picture.patches for picture in pictures]).to(
            device, self.backbone.dtype
        )
        options: dict[str, Any] = {kind: patches}
        options[
            "video_grid_thw" if self.layout.media == "video" else "image_grid_thw"
        ] = torch.tensor([grid] * len(pictures), device=device)
        positions_3NL = torch.arange(len(ids_L), device=device).expand(3, *ids_NL.shape)
        out = self.backbone(
            input_ids=ids_NL, position_ids=positions_3NL, use_cache=False, **options
        )
        places_S = torch.cat(
            [(ids_L == reward).nonzero()[:, 0] for reward in self.reward_ids]
        )
        out_NSO = self.head(out.last_hidden_state[:, places_S.to(device)].float()).cpu()
        return self._named(out_NSO)

    def _named(self, out_NSO: Tensor) -> Tensor:
        """Token s has one number, or all of them if it is alone; with as many of both, token s has number s."""
        _, tokens, numbers = out_NSO.shape
        found_NK = out_NSO[:, 0] if tokens == 1 else out_NSO[..., 0]
        if tokens > 1 and numbers > 1:
            found_NK = out_NSO.diagonal(dim1=1, dim2=2)
        if found_NK.shape[1] != len(self.layout.outputs):
            raise ValueError(
                f"{tokens} reward tokens and a head of {numbers} give {found_NK.shape[1]} numbers, "
                f"judge.json names {len(self.layout.outputs)}"
            )
        mean_K, std_K = torch.tensor(
            [self.layout.normal.get(name, (0.0, 1.0)) for name in self.layout.outputs]
        ).T
        return (found_NK - mean_K) / std_K

    def read_video(self, frames_TYXC: Tensor, prompt: str, *, fps: float) -> Tensor:
        """(K,), of the frames of one video at its true rate."""
        settings = self.layout.settings
        seen = frame_indices(len(frames_TYXC), fps, settings)
        return self.read([preprocess(frames_TYXC[seen], settings)], prompt)[0]

    def read_images(
        self, frames_NYXC: Tensor, prompt: str, *, portions: AdaptiveBatcher
    ) -> Tensor:
        """(N, K), of each frame as an image of its own, as many at once as ``portions`` say."""
        pictures = [
            preprocess(frame_YXC[None], self.layout.settings)
            for frame_YXC in frames_NYXC
        ]
        return torch.cat(
            portions.each(lambda part: self.read(pictures[part], prompt), len(pictures))
        )


def chat(
    tokenizer: PreTrainedTokenizerBase,
    picture: Sequence[int],
    instruction: str,
    prompt: str,
    *,
    tokens: Sequence[str] = (),
) -> list[int]:
    """Ids of Qwen2-VL's chat up to the answer: system message, picture, instruction with the prompt in its slot.

    Control tokens and ``tokens`` of the instruction stand by id; the prompt is text, whatever it spells.
    """
    start, end = token_id(tokenizer, IM_START), token_id(tokenizer, IM_END)

    def text(words: str) -> list[int]:
        return encode_text(tokenizer, words)

    ids = [start, *text(f"system\n{SYSTEM}"), end, *text("\n"), start, *text("user\n")]
    ids += [
        token_id(tokenizer, VISION_START),
        *picture,
        token_id(tokenizer, VISION_END),
    ]
    pattern = "(" + "|".join(re.escape(token) for token in tokens) + ")"
    for piece in re.split(pattern, instruction) if tokens else [instruction]:
        ids += (
            [token_id(tokenizer, piece)]
            if piece in tokens
            else text(piece.replace(PROMPT_SLOT, prompt))
        )
    return [*ids, end, *text("\n"), start, *text("assistant\n")]


def frame_indices(count: int, fps: float, settings: VideoSettings) -> list[int]:
    """Which of ``count`` frames at ``fps`` are seen: an even number of them, ``settings.fps`` a second, uniform, first
    and last included (qwen-vl-utils of VideoReward's day). Odd clips lose a frame of the count, not the last one.
    """
    if count < 1 or not fps > 0:
        raise ValueError(f"frame_indices: {count} frames at {fps} fps")
    most = min(settings.max_frames, count) // 2 * 2
    wanted = min(max(count / fps * settings.fps, settings.min_frames), max(most, 1))
    seen = min(max(1, round(wanted / 2) * 2), count)
    return (
        torch.linspace(0, count - 1, seen, dtype=torch.float64).round().long().tolist()
    )


def head_of(state: Mapping[str, Tensor]) -> nn.Module:
    """The head whose weights these are: one linear ("weight"), or linears with ReLUs between ("0.weight", ...).

    Dropout layers, which the published numbering counts, have nothing to do here. ValueError for other names.
    """
    if set(state) in ({"weight"}, {"weight", "bias"}):
        return _linear(state, "")
    numbers = sorted(
        {
            int(name.split(".")[0])
            for name in state
            if re.fullmatch(r"\d+\.(weight|bias)", name)
        }
    )
    if not numbers or {
        f"{n}.{part}" for n in numbers for part in ("weight", "bias")
    } - set(state):
        raise ValueError(
            f"a head is one linear or a row of numbered ones, got {sorted(state) or 'nothing'}"
        )
    layers: list[tuple[str, nn.Module]] = []
    for n in numbers:
        layers += [(str(n), _linear(state, f"{n}.")), (f"after_{n}", nn.ReLU())]
    head = nn.Sequential()
    for name, layer in layers[:-1]:
        head.add_module(name, layer)
    return head


def _linear(state: Mapping[str, Tensor], prefix: str) -> nn.Linear:
    weight, bias = state[prefix + "weight"], state.get(prefix + "bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict(
        {"weight": weight, **({} if bias is None else {"bias": bias})}
    )
    return linear


@functools.lru_cache
def shared(folder: str, device: str | None, dtype: str) -> Qwen2VLRewardModel:
    """One judge for all rewards of a process that name the same folder: two HPSv3 rewards need its weights once."""
    return Qwen2VLRewardModel.load(folder, device=device, dtype=dtype)
