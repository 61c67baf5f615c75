"""A tiny random checkpoint in the layout of the official DeScore's stage 1, and its reward.

The layout is that of `rm.convert.official`'s docstring; the tokenizer's files have the form that
transformers 4.57 writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from rm.convert.official import REWARD
from rm.model import Batch
from tests.tiny_qwen import tiny_qwen, tiny_tokenizer

RANK, ALPHA = 4, 128
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WRAPPED = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """The trained model in memory: peft around a stock Qwen3-VL, and a head."""

    model: peft.PeftModel
    head_1D: Tensor
    reward_id: int

    @torch.no_grad()
    def reward(self, batch: Batch) -> Tensor:
        """Rewards (B,) in fp64, with `<Reward>` as an ordinary token and the stock positions."""
        stock = self.model.base_model.model.model
        kinds = (batch.ids_BL == stock.config.video_token_id).int() * 2
        positions, _ = stock.get_rope_index(
            batch.ids_BL,
            mm_token_type_ids=kinds,
            video_grid_thw=batch.grid_B3,
            attention_mask=batch.mask_BL,
        )
        hidden_BLD = stock(
            input_ids=batch.ids_BL,
            attention_mask=batch.mask_BL,
            position_ids=positions,
            pixel_values_videos=batch.patches,
            video_grid_thw=batch.grid_B3,
            mm_token_type_ids=kinds,
        ).last_hidden_state
        at_reward_BL = (batch.ids_BL == self.reward_id) & batch.mask_BL.bool()
        assert at_reward_BL.sum(1).eq(1).all()
        return (hidden_BLD[at_reward_BL].double() @ self.head_1D.double().T).squeeze(1)


def train(*, tied: bool = False) -> Trained:
    """Build the model as the official stage 1 does, with random numbers for trained ones.

    ``<Reward>`` becomes id 264 and the embeddings are resized to 265 rows: from 320, they shrink.
    """
    base = tiny_qwen(tied=tied)
    tokenizer = tokenizer_with_reward()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    reward_id = tokenizer.convert_tokens_to_ids(REWARD)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        base.get_input_embeddings().weight[reward_id] = (
            torch.randn(32, generator=draw) * 0.3
        )
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        exclude_modules=".*visual.*",
    )
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * (
                0.3 if "lora_A" in name else 0.005
            )
    return Trained(model, torch.randn(1, 32, generator=draw), reward_id)


def write(
    folder: Path,
    trained: Trained,
    *,
    sharded: bool = False,
    wrapped_names: bool = False,
) -> Path:
    """Write ``checkpoint-N``; ``wrapped_names`` keeps peft's names of the weights."""
    folder.mkdir(parents=True)
    state = trained.model.state_dict()
    lora = {
        name.replace(".default.", "."): value.contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
    (folder / "lora_adapter").mkdir()
    save_file(lora, folder / "lora_adapter/adapter_model.safetensors")
    record = peft.LoraConfig(
        r=RANK, lora_alpha=128, target_modules=list(TARGETS)
    ).to_dict()
    record |= {"target_modules": list(TARGETS), "task_type": None, "peft_type": "LORA"}
    (folder / "lora_adapter/adapter_config.json").write_text(
        json.dumps(record, default=str)
    )
    base = trained.model.base_model.model
    rest = {name: value for name, value in state.items() if ".lora_" not in name}
    plain = {
        name.removeprefix(WRAPPED).replace(".base_layer.", "."): value
        for name, value in rest.items()
    }
    if wrapped_names:
        save_file(
            {name: value.clone() for name, value in rest.items()},
            folder / "model.safetensors",
        )
        base.config.save_pretrained(folder)
    else:
        base.save_pretrained(
            folder, state_dict=plain, max_shard_size="40KB" if sharded else "5GB"
        )
    write_tokenizer(folder)
    torch.save({f"{WRAPPED}rm_head.weight": trained.head_1D}, folder / "rm_head.pth")
    return folder


def tokenizer_with_reward():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer as transformers 4.57 does: three files list the added tokens."""
    tokenizer = tokenizer_with_reward()
    tokenizer.save_pretrained(folder)
    added = {
        str(i): {
            "content": t.content,
            "lstrip": t.lstrip,
            "normalized": t.normalized,
            "rstrip": t.rstrip,
            "single_word": t.single_word,
            "special": t.special,
        }
        for i, t in tokenizer.added_tokens_decoder.items()
    }
    names = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [REWARD],
    }
    config = {
        "added_tokens_decoder": added,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    mapped = {
        **names,
        "additional_special_tokens": [
            added[str(tokenizer.convert_tokens_to_ids(REWARD))]
        ],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(mapped))
    (folder / "added_tokens.json").write_text(
        json.dumps({t["content"]: int(i) for i, t in added.items()})
    )
