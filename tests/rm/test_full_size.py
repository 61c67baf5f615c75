"""Trained parameters of the full-size reward models on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import load
from launch.schemas.training import ColdStartRun
from rm.model import DeScore
from tests.tiny_qwen import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# hidden, layers, heads, feed-forward, tied,
# vision depth, vision width, vision feed-forward, deepstack, parameters
SIZES = {
    "2B": (2048, 28, 16, 6144, True, 24, 1024, 4096, [5, 11, 17], 2.13e9),
    "4B": (2560, 36, 32, 9728, True, 24, 1024, 4096, [5, 11, 17], 4.44e9),
    "8B": (4096, 36, 32, 12288, False, 27, 1152, 4304, [8, 16, 24], 8.77e9),
}
HEAD_DIM, KV_HEADS, ROWS, QUERY_ID = 128, 8, 151_936, 151_669


def judge_of(size: str) -> DeScore:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    hidden, layers, heads, wide, tied, depth, seen, seen_wide, deep, _ = SIZES[size]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": ROWS,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": wide,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": depth,
            "hidden_size": seen,
            "intermediate_size": seen_wide,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deep,
        },
        tie_word_embeddings=tied,
    )
    from rm.prompt import DEFAULT_TEMPLATE

    recipe = load(ColdStartRun, ROOT / "configs/wan/cold_start.yaml")
    with torch.device("meta"):
        backbone = Qwen3VLForConditionalGeneration(config)
        return DeScore(
            backbone,
            tiny_tokenizer(),
            DEFAULT_TEMPLATE,
            recipe.video,
            QUERY_ID,
            recipe.generation,
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_full_size_trainable_parameters(size: str) -> None:
    hidden, layers, heads, wide, *_, parameters = SIZES[size]
    judge = judge_of(size)
    assert sum(p.numel() for p in judge.backbone.parameters()) == pytest.approx(
        parameters, rel=0.005
    )
    recipe = load(ColdStartRun, ROOT / "configs/wan/cold_start.yaml")
    groups = judge.param_groups(recipe.lr, lora=recipe.lora, weight_decay=0.0)
    counts = {
        group["name"]: sum(p.numel() for p in group["params"]) for group in groups
    }
    q, kv, rank = heads * HEAD_DIM, KV_HEADS * HEAD_DIM, recipe.lora.rank
    ins_and_outs = (
        2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + wide)
    )  # q and o, k and v, gate, up and down
    assert counts["llm"] == layers * rank * ins_and_outs
    assert (counts["query"], counts["head"]) == (hidden, hidden)
    visual = judge.backbone.model.visual
    assert counts["vision"] + counts["merger"] == sum(
        p.numel() for p in visual.parameters()
    )
    assert judge.backbone.get_input_embeddings().weight.shape == (
        ROWS,
        hidden,
    )  # the query took a free row
