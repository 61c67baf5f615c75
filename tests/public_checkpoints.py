"""Tiny random checkpoints in the layouts of VideoReward and HPSv3, and their rewards.

Rewards are computed as the releases do: transformers' processor and tokenizer on the rendered chat,
the picture's features scattered into the embeddings, the language model without ids and positions,
the head at the reward tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

from rm.baselines.load_published import read_hpsv3, read_videoreward
from tests.tiny_qwen import control_ids, lively, tiny_tokenizer, vision_ids

RANK, ALPHA, WIDTH = 4, 8, 32
VIDEO_TOKENS, IMAGE_TOKENS = (
    ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"],
    ["<|Reward|>"],
)
VIDEO_INSTRUCTION = (
    "\nRate it.\nQuality: <|VQ_reward|>\nEND\nMotion: <|MQ_reward|>\nEND\n\n"
    "Textual prompt - {text_prompt}\nAlignment: <|TA_reward|>\nEND\n"
)
IMAGE_INSTRUCTION = (
    "\nRate it.\nTextual prompt - {text_prompt}\n\n\n\nPlease: <|Reward|>\n\nEND\n"
)
NORMAL = {"VQ": (3.5, 2.25), "MQ": (1.25, 1.5), "TA": (2.75, 2.5)}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{pads}<|vision_end|>"
    "{text}<|im_end|>\n<|im_start|>assistant\n"
)


def tokenizer_with(tokens: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens],
        special_tokens=True,
    )
    return tokenizer


def text_config() -> dict[str, object]:
    """The language model of a tiny Qwen2-VL or Qwen2.5-VL, hidden 32."""
    ids = control_ids()
    return {
        "vocab_size": 320,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }


def tiny_qwen2(*, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Random weights, patches of 14, fp32."""
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_size": WIDTH,
        "mlp_ratio": 2,
    }
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config=text_config(),
        tie_word_embeddings=True,
        **vision_ids(),
    )
    return lively(Qwen2VLForConditionalGeneration, config, seed=seed)


def save_base(folder: Path) -> Path:
    """Config and tokenizer as the base's folder has them."""
    tiny_qwen2().config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Released:
    """A release in memory; VideoReward's model is wrapped by peft."""

    model: nn.Module
    head: nn.Module
    tokenizer: PreTrainedTokenizerFast
    tokens: list[str]
    instruction: str

    @torch.no_grad()
    def reward(self, frames: list[Image.Image], prompt: str, *, video: bool) -> Tensor:
        """(tokens, outputs), of resized frames: all of them one video, or one image."""
        found = [
            Qwen2VLImageProcessorPil(do_resize=False, patch_size=14)(
                images=[frame], return_tensors="pt"
            )
            for frame in frames
        ]
        grid = found[0].image_grid_thw
        cut = [one.pixel_values.view(len(one.pixel_values), 3, 2, -1) for one in found]
        # An image is its frame twice: a video's patch takes a half of each of two images.
        if video:
            pairs = [
                torch.stack([a[:, :, 0], b[:, :, 1]], 2)
                for a, b in zip(cut[::2], cut[1::2], strict=True)
            ]
            grid = grid.clone()
            grid[0, 0] = len(pairs)
            patches = torch.cat(pairs).flatten(1)
        else:
            patches = found[0].pixel_values
        model = (
            self.model.base_model.model.model
            if isinstance(self.model, peft.PeftModel)
            else self.model.model
        )
        pad = "<|video_pad|>" if video else "<|image_pad|>"
        text = CHAT.format(
            pads=pad * int(grid.prod() // 4),
            text=self.instruction.format(text_prompt=prompt),
        )
        ids_1L = self.tokenizer(text, return_tensors="pt").input_ids
        embeds = model.get_input_embeddings()(ids_1L)
        features = model.visual(patches, grid_thw=grid).pooler_output
        embeds[ids_1L == self.tokenizer.convert_tokens_to_ids(pad)] = features
        hidden_LD = model.language_model(
            inputs_embeds=embeds, position_ids=None
        ).last_hidden_state[0]
        special_L = torch.isin(
            ids_1L[0], torch.tensor(self.tokenizer.convert_tokens_to_ids(self.tokens))
        )
        return self.head(hidden_LD[special_L])


def videoreward() -> Released:
    """LoRA on every linear of the language model, resized embeddings, a head without bias."""
    model, tokenizer = tiny_qwen2(), tokenizer_with(VIDEO_TOKENS)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    draw = torch.Generator().manual_seed(1)
    model.rm_head = nn.Linear(WIDTH, 1, bias=False)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not {"lm_head", "rm_head", "visual"} & set(name.split("."))
    ]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    ).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[-3:] = (
            torch.randn(3, WIDTH, generator=draw) * 0.3
        )
        model.rm_head.weight.copy_(torch.randn(1, WIDTH, generator=draw))
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=draw)
                    * (0.3 if "lora_A" in name else 0.05)
                )
    return Released(wrapped, model.rm_head, tokenizer, VIDEO_TOKENS, VIDEO_INSTRUCTION)


def hpsv3() -> Released:
    """All weights trained, and a head of three linears."""
    model, tokenizer = tiny_qwen2(seed=1), tokenizer_with(IMAGE_TOKENS)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.rm_head = nn.Sequential(
            nn.Linear(WIDTH, 24),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        with torch.no_grad():
            for parameter in model.rm_head.parameters():
                parameter.mul_(3.0)
    return Released(
        model.eval(), model.rm_head.eval(), tokenizer, IMAGE_TOKENS, IMAGE_INSTRUCTION
    )


def old_name(name: str) -> str:
    """As transformers before 4.52 called it."""
    return name.replace("model.language_model.", "model.").replace(
        "model.model.visual.", "model.visual."
    )


def write_videoreward(folder: Path, released: Released, *, old: bool = True) -> Path:
    """The folder as published, its weights a pickle."""
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    state = released.model.state_dict()
    torch.save(
        {old_name(name) if old else name: value for name, value in state.items()},
        checkpoint / "model.pth",
    )
    config = {
        "data_config": {
            "meta_data": "x",
            "data_dir": "y",
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "use_rslora": False,
        },
        "inference_config": {
            f"{name}_{part}": value
            for name, pair in NORMAL.items()
            for part, value in zip(("mean", "std"), pair, strict=True)
        },
    }
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "instruction.txt").write_text(VIDEO_INSTRUCTION)
    return folder


def write_hpsv3(folder: Path, released: Released, *, old: bool = False) -> Path:
    folder.mkdir(parents=True)
    state = {
        name: value.clone().contiguous()
        for name, value in released.model.state_dict().items()
    }
    if old:
        state = {
            old_name(f"model.{name}").removeprefix("model."): value
            for name, value in state.items()
        }
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(IMAGE_INSTRUCTION)
    return folder


def converted(root: Path) -> dict[str, str]:
    """Both releases, as launch/convert_reward.py leaves them: kind of reward -> folder."""
    base = save_base(root / "base")
    video = write_videoreward(root / "VideoReward", videoreward())
    image = write_hpsv3(root / "HPSv3", hpsv3())
    judges = {
        "videoreward": read_videoreward(
            video, base=base, instruction=video / "instruction.txt", allow_pickle=True
        ),
        "hpsv3": read_hpsv3(image, base=base, instruction=image / "instruction.txt"),
    }
    for kind, read in judges.items():
        read.model.save(root / kind)
    return {kind: str(root / kind) for kind in judges}


def resized(frames_TYXC: Tensor, height: int, width: int) -> list[Image.Image]:
    """By Pillow, bicubic, as qwen-vl-utils does with images."""
    return [
        Image.fromarray(np.asarray(f)).resize((width, height), Image.Resampling.BICUBIC)
        for f in frames_TYXC
    ]
