"""Reward models that read rewards at special tokens of a Qwen2-VL: VideoReward and HPSv3.

VideoReward is arXiv 2501.13918, HPSv3 is arXiv 2508.03789. Both read one sequence, without a chain
of thought::

    <|im_start|>system NEWLINE You are a helpful assistant.<|im_end|> NEWLINE
    <|im_start|>user NEWLINE <|vision_start|>{pads}<|vision_end|>{instruction}<|im_end|> NEWLINE
    <|im_start|>assistant NEWLINE

The instruction holds the prompt and the reward tokens. The head reads the last hidden state at each
reward token. Positions are 0, 1, 2, ... for every token, those of the picture too: the released
code passes embeddings without ids and positions to the language model, and transformers then counts
(4.45, which VideoReward pins, never computes M-RoPE there). With Qwen2-VL's three-dimensional
positions the same weights give other, untrained rewards.

`rm.baselines.load_published` converts the published checkpoints into a folder that
`Qwen2VLRewardModel.load` reads.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from common.files import give_usual_mode, write_json
from common.memory import AdaptiveBatcher, default_device
from common.schema import PositiveFloat, config, read_section
from common.strict_loading import errors_of, require_finite
from common.weight_files import load_safetensors, require_whole_folder
from rm.config import VideoSettings
from rm.convert.weights import build_model
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

# The name of the file predates the term reward model; folders of users have it.
LAYOUT_FILE = "judge.json"
WEIGHTS_FILE = "model.safetensors"
HEAD_PREFIX = "rm_head."
SYSTEM_MESSAGE = "You are a helpful assistant."
PADS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}


@config
class Layout:
    """The settings of a reward model besides weights, config and tokenizer; saved as judge.json.

    instruction  The text after the picture. It holds ``{prompt}`` once, and every reward token
                 once, in the order of ``tokens``.
    tokens       The reward tokens.
    outputs      A name for every reward: one per token or, for a single token, one per output of
                 the head.
    media        "video" if a picture is a whole video, "image" if it is one frame.
    settings     How frames are sampled and cut into patches.
    normal       Maps a name to (mean, std): that reward is given as (x - mean) / std.
    """

    instruction: str
    tokens: tuple[str, ...]
    outputs: tuple[str, ...]
    media: Literal["video", "image"]
    settings: VideoSettings
    normal: dict[str, tuple[float, PositiveFloat]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The head reads the reward tokens at their places in the sequence.
        for part in (PROMPT_SLOT, *self.tokens):
            count = self.instruction.count(part)
            if count != 1:
                raise ValueError(
                    f"the instruction must hold {part} exactly once, but holds it {count} times"
                )
        places = [self.instruction.index(token) for token in self.tokens]
        if places != sorted(places):
            raise ValueError(
                f"the instruction must hold {', '.join(self.tokens)} in this order"
            )
        unknown = self.normal.keys() - set(self.outputs)
        if unknown:
            raise ValueError(f"normal names {unknown}, which {self.outputs} lacks")

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Layout:
        """Read judge.json. FileNotFoundError or ValueError name the file."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; launch/convert_reward.py writes such a folder"
            )
        return read_section(cls, path)


class Qwen2VLRewardModel(nn.Module):
    """A Qwen2-VL without its vocabulary head, and a reward head in fp32."""

    def __init__(
        self,
        backbone: Qwen2VLModel,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # Rewards are computed in fp32 whatever the backbone's dtype is.
        self.head = head.float()
        self.tokenizer = tokenizer
        self.layout = layout
        self.reward_ids = [token_id(tokenizer, token) for token in layout.tokens]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | None = None,
        dtype: str = "float32",
    ) -> Qwen2VLRewardModel:
        """Load a folder that `save` wrote. FileNotFoundError or ValueError name the file."""
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        # The head's weights lie in the same file as the backbone's.
        folder = Path(folder)
        layout = Layout.load(folder / LAYOUT_FILE)
        require_whole_folder(folder)
        state = load_safetensors(folder / WEIGHTS_FILE)
        head = take_head(state)
        require_finite(head.state_dict(), folder / WEIGHTS_FILE)
        with errors_of(folder, "config and tokenizer"):
            config = Qwen2VLConfig.from_pretrained(folder.as_posix())
            tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())
        # The backbone's weights are checked as it is built.
        backbone = build_model(
            Qwen2VLModel,
            config,
            state,
            dtype=dtype,
            source=folder,
        )

        # A reward model is never trained here.
        model = cls(backbone, head, tokenizer, layout)
        model.requires_grad_(requires_grad=False)
        return model.eval().to(device or default_device())

    def save(self, folder: str | Path) -> None:
        """Write config.json, the tokenizer, judge.json and, last, model.safetensors."""
        from safetensors.torch import save_file

        # Config and tokenizer, then the weights of backbone and head.
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.layout.save(folder / LAYOUT_FILE)
        state = {}
        for name, tensor in self.backbone.state_dict().items():
            state[name] = tensor.contiguous()
        for name, tensor in self.head.state_dict().items():
            state[HEAD_PREFIX + name] = tensor.contiguous()
        save_file(state, folder / WEIGHTS_FILE)
        give_usual_mode(folder / WEIGHTS_FILE)

    def encode(self, prompt: str, grid: Sequence[int]) -> list[int]:
        """Return the ids of the sequence for a picture of (t, h, w) patches."""
        # The picture's place is held by a pad for each merged patch.
        layout = self.layout
        pads = math.prod(grid) // layout.settings.merge_size**2
        pad_id = token_id(self.tokenizer, PADS[layout.media])
        return chat_ids(
            self.tokenizer,
            [pad_id] * pads,
            layout.instruction,
            prompt,
            tokens=layout.tokens,
        )

    @torch.no_grad()
    def read(self, pictures: Sequence[PixelPatches], prompt: str) -> Tensor:
        """Return the normalised rewards (N, K) in fp32 on the CPU.

        N pictures of equal size share a prompt; K are the layout's outputs. ValueError for
        pictures of several sizes.
        """
        grid = pictures[0].grid
        if any(picture.grid != grid for picture in pictures):
            raise ValueError(f"pictures of a batch must all have the grid {grid}")

        # The same ids for every picture; positions are counted (see the module's docstring).
        device = self.backbone.device
        ids_L = torch.tensor(self.encode(prompt, grid))
        ids_NL = ids_L.expand(len(pictures), -1).to(device)
        positions_3NL = torch.arange(len(ids_L), device=device).expand(3, *ids_NL.shape)
        patches = torch.cat([picture.patches for picture in pictures])
        patches = patches.to(device, self.backbone.dtype)
        grids_N3 = torch.tensor([grid] * len(pictures), device=device)
        if self.layout.media == "video":
            media = {"pixel_values_videos": patches, "video_grid_thw": grids_N3}
        else:
            media = {"pixel_values": patches, "image_grid_thw": grids_N3}
        out = self.backbone(
            input_ids=ids_NL,
            position_ids=positions_3NL,
            use_cache=False,
            **media,
        )

        # The head reads the S reward tokens, in the order of the layout.
        places_S = torch.cat(
            [(ids_L == reward_id).nonzero()[:, 0] for reward_id in self.reward_ids]
        )
        hidden_NSD = out.last_hidden_state[:, places_S.to(device)]
        return self._normalised(self.head(hidden_NSD.float()).cpu())

    def _normalised(self, out_NSO: Tensor) -> Tensor:
        """Choose K of the head's O outputs at S reward tokens, and normalise them.

        A single token gives all outputs. Several tokens give the head's only output each or,
        where the head has an output for each token, token s gives output s.
        """
        _, tokens, outputs = out_NSO.shape
        if tokens == 1:
            rewards_NK = out_NSO[:, 0]
        elif outputs == 1:
            rewards_NK = out_NSO[..., 0]
        else:
            rewards_NK = out_NSO.diagonal(dim1=1, dim2=2)

        # Every reward needs a name.
        names = self.layout.outputs
        if rewards_NK.shape[1] != len(names):
            raise ValueError(
                f"{tokens} reward tokens and a head of {outputs} outputs give "
                f"{rewards_NK.shape[1]} rewards, but {LAYOUT_FILE} names {len(names)}"
            )
        normal = [self.layout.normal.get(name, (0.0, 1.0)) for name in names]
        mean_K, std_K = torch.tensor(normal).T
        return (rewards_NK - mean_K) / std_K

    def read_video(
        self,
        frames_TYXC: Tensor,
        prompt: str,
        *,
        fps: float,
    ) -> Tensor:
        """Return the rewards (K,) of a video, given its frames at their true rate."""
        # Frames at the rate that the model was trained with.
        settings = self.layout.settings
        seen = frame_indices_qwen_utils(len(frames_TYXC), fps, settings)
        return self.read([preprocess(frames_TYXC[seen], settings)], prompt)[0]

    def read_images(
        self,
        frames_NYXC: Tensor,
        prompt: str,
        *,
        portions: AdaptiveBatcher,
    ) -> Tensor:
        """Return the rewards (N, K) of frames that are images each, in batches of ``portions``."""
        # Every frame is a separate picture.
        pictures = [
            preprocess(frame_YXC[None], self.layout.settings)
            for frame_YXC in frames_NYXC
        ]
        rewards = portions.each(
            lambda part: self.read(pictures[part], prompt), len(pictures)
        )
        return torch.cat(rewards)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    picture: Sequence[int],
    instruction: str,
    prompt: str,
    *,
    tokens: Sequence[str] = (),
) -> list[int]:
    """Return the ids of Qwen2-VL's chat up to the answer, with the prompt in the instruction.

    Control tokens and the instruction's ``tokens`` are placed by id. The prompt is encoded as
    text, so it cannot spell any of them.
    """
    before = (
        f"{IM_START}system\n{SYSTEM_MESSAGE}{IM_END}\n{IM_START}user\n{VISION_START}"
    )
    after = f"{VISION_END}{instruction}{IM_END}\n{IM_START}assistant\n"
    names = [IM_START, IM_END, VISION_START, VISION_END, *tokens]
    pattern = "|".join(re.escape(name) for name in names)

    # Cut at every token that is placed by id.
    def ids_of(text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):
            if piece in names:
                ids.append(token_id(tokenizer, piece))
            else:
                filled = piece.replace(PROMPT_SLOT, prompt)
                ids += encode_text(tokenizer, filled)
        return ids

    return [*ids_of(before), *picture, *ids_of(after)]


def frame_indices_qwen_utils(
    count: int,
    fps: float,
    settings: VideoSettings,
) -> list[int]:
    """Choose which of ``count`` frames at ``fps`` are seen, as qwen-vl-utils did for VideoReward.

    The number is even, ``settings.fps`` a second; the frames are evenly spaced, first and last
    included. `rm.video.frame_indices`, which DeScore uses, rounds by another rule.
    """
    if count < 1 or not fps > 0:
        raise ValueError(f"cannot choose from {count} frames at {fps} fps")
    most = min(settings.max_frames, count) // 2 * 2
    wanted = min(max(count / fps * settings.fps, settings.min_frames), max(most, 1))
    # Frames are read in pairs, except from a clip of a single frame.
    seen = min(max(1, round(wanted / 2) * 2), count)
    places = torch.linspace(0, count - 1, seen, dtype=torch.float64)
    return places.round().long().tolist()


def take_head(state: dict[str, Tensor]) -> nn.Module:
    """Take the head's weights out of ``state`` and build the head from them."""
    # What is left is the backbone's.
    names = [name for name in state if name.startswith(HEAD_PREFIX)]
    return reward_head({n.removeprefix(HEAD_PREFIX): state.pop(n) for n in names})


def reward_head(state: Mapping[str, Tensor]) -> nn.Module:
    """Build a head: one linear ("weight"), or linears ("0.weight", ...) with ReLUs between.

    Dropout layers, which the published numbering counts, are left out. ValueError for other names.
    """
    # A single linear.
    if "weight" in state:
        head = _linear(state, "")
        head.load_state_dict(state)
        return head
    # Several linears, in the order of their numbers.
    numbers = sorted({int(n.split(".")[0]) for n in state if re.match(r"\d+\.", n)})
    if not numbers:
        raise ValueError(
            f"a head is a linear or several numbered linears, got {sorted(state)}"
        )
    layers = nn.Sequential()
    for n in numbers:
        # The numbers in between belonged to ReLU and dropout.
        if n != numbers[0]:
            layers.add_module(f"before_{n}", nn.ReLU())
        layers.add_module(str(n), _linear(state, f"{n}."))
    layers.load_state_dict(state)
    return layers


def _linear(state: Mapping[str, Tensor], prefix: str) -> nn.Linear:
    # Sizes follow from the weights.
    rows, columns = state[prefix + "weight"].shape
    return nn.Linear(columns, rows, bias=prefix + "bias" in state)


# Rewards of this process that name the same folder share the model.
shared = functools.lru_cache(Qwen2VLRewardModel.load)
