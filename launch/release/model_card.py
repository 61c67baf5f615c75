"""The README.md of an exported folder: what it is, how it was trained, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from common.run_record import hide_secrets
from launch.release.provenance import Origin

Layout = Literal["lora", "comfyui", "transformer", "judge"]

HERE, BASE = "path/to/this/folder", "path/to/the/base"  # where a name is not known
_TITLES = {
    "lora": "LoRA for Wan",
    "comfyui": "LoRA for Wan, in ComfyUI's layout",
    "transformer": "Wan transformer",
    "judge": "DeScore, a video reward model",
}
_WAN = {"library_name": "diffusers", "pipeline_tag": "text-to-video"}
_FRONT: dict[str, dict[str, Any]] = {
    "lora": {
        **_WAN,
        "tags": ["lora", "wan", "text-to-video", "rlhf"],
        "base_model_relation": "adapter",
    },
    "comfyui": {
        **_WAN,
        "tags": ["lora", "comfyui", "wan", "text-to-video", "rlhf"],
        "base_model_relation": "adapter",
    },
    "transformer": {
        **_WAN,
        "tags": ["wan", "text-to-video", "rlhf"],
        "base_model_relation": "finetune",
    },
    "judge": {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["reward-model", "descore", "video", "rlhf"],
        "base_model_relation": "finetune",
    },
}


@dataclass(frozen=True)
class WrittenFiles:
    """What an export wrote.

    facts    sentences about it, one a line
    file     name of its one file of weights, where a command has to name it
    query_id, rows  a judge's first query token and how many there are
    """

    layout: Layout
    facts: Sequence[str]
    file: str = ""
    query_id: int = 0
    rows: int = 1


def card(
    written: WrittenFiles,
    origin: Origin,
    *,
    base_model: str | None,
    repo_id: str | None,
) -> str:
    """Markdown after a YAML head. ``base_model`` and ``repo_id`` are hub names; without them commands have a blank."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(written, origin, base_model), sort_keys=False)}---",
        f"# {_TITLES[written.layout]}{f', trained by {origin.algorithm}' if origin.algorithm else ''}",
        _opening(written, base_model),
        "\n".join(f"- {fact}" for fact in written.facts),
        f"## Use\n\n{_use(written, repo_id or HERE, base_model or BASE)}",
        *_training(origin),
    ]
    return hide_secrets("\n\n".join(part for part in parts if part) + "\n")


def front_matter(
    written: WrittenFiles, origin: Origin, base_model: str | None
) -> dict[str, Any]:
    """What the hub reads. No base_model unless there is a hub name for it."""
    front = dict(_FRONT[written.layout])
    relation = front.pop("base_model_relation")
    method = (
        origin.algorithm.partition(",")[0].lower().replace(" ", "-")
        if origin.algorithm
        else None
    )
    front["tags"] = [
        *front["tags"],
        *([method] if method and method not in front["tags"] else []),
    ]
    known = (
        {}
        if base_model is None
        else {"base_model": base_model, "base_model_relation": relation}
    )
    return {**known, **front}


def _opening(written: WrittenFiles, base_model: str | None) -> str:
    on = (
        f" It was trained from [{base_model}](https://huggingface.co/{base_model})."
        if base_model
        else ""
    )
    if written.layout == "judge":
        return (
            "A fine-tuned Qwen3-VL that judges how well a video shows what a prompt asked: it writes a chain of "
            "thought, then a query token is read by a linear head. The reward is a raw logit: only the order and the "
            f"differences of rewards mean something.{on}"
        )
    what = (
        "The whole transformer, fine-tuned"
        if written.layout == "transformer"
        else "A low-rank adapter"
    )
    return f"{what}, for text-to-video.{on}"


def _use(written: WrittenFiles, where: str, base: str) -> str:
    build = {
        "lora": _use_lora,
        "comfyui": _use_comfyui,
        "transformer": _use_transformer,
        "judge": _use_judge,
    }
    return build[written.layout](written, where, base)


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _use_lora(written: WrittenFiles, where: str, base: str) -> str:
    return _python(
        "import torch",
        "from diffusers import WanPipeline",
        "",
        f'pipeline = WanPipeline.from_pretrained("{base}", dtype=torch.bfloat16)',
        f'pipeline.load_lora_weights("{where}", weight_name="{written.file}")',
    )


def _use_comfyui(written: WrittenFiles, where: str, base: str) -> str:
    return (
        f"Put `{written.file}` into ComfyUI's `models/loras` and load it with a LoraLoaderModelOnly node after the Wan "
        f"model, strength 1. Diffusers reads it as well:\n\n{_use_lora(written, where, base)}"
    )


def _use_transformer(written: WrittenFiles, where: str, base: str) -> str:
    options = 'subfolder="transformer", dtype=torch.bfloat16'
    return _python(
        "import torch",
        "from diffusers import WanPipeline, WanTransformer3DModel",
        "",
        f'transformer = WanTransformer3DModel.from_pretrained("{where}", {options})',
        f'pipeline = WanPipeline.from_pretrained("{base}", transformer=transformer, dtype=torch.bfloat16)',
    )


def _use_judge(written: WrittenFiles, where: str, base: str) -> str:
    ours = _python(
        *(
            ()
            if where == HERE
            else ("from huggingface_hub import snapshot_download", "")
        ),
        "from rm.scorer import DeScoreScorer",
        "",
        f'folder = "{where}"'
        if where == HERE
        else f'folder = snapshot_download("{where}")',
        "scorer = DeScoreScorer.load(folder)",
        'score = scorer.score(["video.mp4"], ["a prompt"])  # value_B, parts, texts',
    )
    first, last = written.query_id, written.query_id + written.rows
    stock = _python(
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import Qwen3VLForConditionalGeneration",
        "",
        "model = Qwen3VLForConditionalGeneration.from_pretrained(folder)",
        'own = load_file(f"{folder}/descore.safetensors")  # query and head, (rewards, hidden size) each',
        "with torch.no_grad():",
        f'    model.get_input_embeddings().weight[{first}:{last}] = own["query"]',
    )
    return (
        f'{ours}\n\nWith transformers alone it is a Qwen3-VL, and a reward is `own["head"][k] @ h`, h the last hidden '
        f"state at query id {first} + k, after the chain of thought. `prompt.json` and `video.json` say what it is "
        f"asked and what it sees.\n\n{stock}"
    )


def _training(origin: Origin) -> list[str]:
    if origin.algorithm is None:
        return []
    steps = (
        f"{origin.algorithm}, {origin.steps} steps."
        if origin.steps
        else f"{origin.algorithm}."
    )
    parts = [f"## Training\n\n{steps}"]
    if origin.rewards:
        weights = ", ".join(
            f"{name} (weight {weight:g})" for name, weight in origin.rewards.items()
        )
        parts.append(f"Rewards: {weights}.")
    parts.append(
        _table(
            ("setting", "value"),
            [(f"`{key}`", value) for key, value in origin.settings.items()],
        )
    )
    if origin.changes:
        parts.append("Logged while training, the mean of so many values at each end:")
        rows = [
            (f"`{c.name}`", f"{c.first:.4g}", f"{c.last:.4g}", str(c.over))
            for c in origin.changes
        ]
        parts.append(_table(("quantity", "first", "last", "values"), rows))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
