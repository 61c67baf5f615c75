"""A random Qwen3-VL of 60 thousand parameters with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rm.prompt import CONTROL_TOKENS, PromptTemplate
from rm.video import VideoSettings

T = TypeVar("T", bound=torch.nn.Module)
# Qwen3 has added tokens that are not special: ordinary words to the reward model.
PLAIN_ADDED = "<think>"
TEMPLATE = PromptTemplate("Text: {prompt}\nVideo: ", "\nJudge it.")
SETTINGS = VideoSettings(
    fps=4.0, min_frames=4, max_frames=8, min_pixels=256, max_pixels=1024, patch_size=8
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255), then the control tokens, then `PLAIN_ADDED`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    core.add_tokens([AddedToken(PLAIN_ADDED, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def tiny_qwen(
    *, seed: int = 0, vocab_size: int = 320, layers: int = 2, tied: bool = True
) -> Qwen3VLForConditionalGeneration:
    """Build random weights: patch 8, hidden 32, fp32; ids above the tokenizer's are free."""
    ids = control_ids()
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": tied,
        },
        tie_word_embeddings=tied,
        **vision_ids(),
    )
    return lively(Qwen3VLForConditionalGeneration, config, seed=seed)


def control_ids() -> dict[str, int]:
    """Of the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    return {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL_TOKENS}


def vision_ids() -> dict[str, int]:
    """As a Qwen-VL's config names them."""
    names = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return {
        name: control_ids()[token] for name, token in zip(names, tokens, strict=True)
    }


def lively(kind: type[T], config: PreTrainedConfig, *, seed: int = 0) -> T:
    """Build a random model in eval mode whose outputs differ between inputs.

    The weights are spread, because those of the default initialisation are too small.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
    return model.eval()


def save_tiny_qwen(path: str | Path, **options: object) -> Path:
    """An ordinary `from_pretrained` folder with model and tokenizer."""
    tiny_qwen(**options).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)


def speak_plainly(backbone: Qwen3VLForConditionalGeneration) -> None:
    """Allow twelve letters and the end of turn only, so CoTs end after a dozen tokens."""
    tokenizer = tiny_tokenizer()
    allowed = [*tokenizer.encode("abcdefghijkl"), tokenizer.eos_token_id]
    bias = torch.full((backbone.lm_head.out_features,), -100.0)
    bias[allowed] = 0.0
    backbone.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)


def random_frames(seed: int, *, frames: int = 8, size: int = 32) -> torch.Tensor:
    """uint8 (T, Y, X, 3) noise, coarse enough to survive a patch."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, 256, (frames, size // 4, size // 4, 3), generator=draw, dtype=torch.uint8
    )
    return coarse.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
