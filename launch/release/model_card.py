"""Write the model card of an exported folder: its contents, its training, and how to load it.

The text is launch/templates/model_card.md, the rest is huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.run_record import hide_secrets
from launch.release.provenance import Provenance

TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"
# The commands of a card name these where a hub name is not known.
FOLDER_BLANK = "path/to/this/folder"
BASE_BLANK = "path/to/the/base"
# By layout.
TITLES = {
    "lora": "LoRA for Wan",
    "comfyui": "LoRA for Wan, in ComfyUI's layout",
    "transformer": "Wan transformer",
    "descore": "DeScore, a video reward model",
}
TAGS = {
    "lora": ["lora", "wan", "text-to-video", "rlhf"],
    "comfyui": ["lora", "comfyui", "wan", "text-to-video", "rlhf"],
    "transformer": ["wan", "text-to-video", "rlhf"],
    "descore": ["reward-model", "descore", "video", "rlhf"],
}


@dataclass(frozen=True)
class ExportedFiles:
    """The files that an export wrote.

    facts     Sentences about them for the card and the console.
    file      The name of the file of weights, where a command has to name it.
    second_file  The same of the transformer for low noise, where a model has two.
    parts     Folders of the transformers that are written whole.
    pipeline  Class of the stock pipeline that the weights belong to.
    query_id  A DeScore's first query token.
    rewards   The number of a DeScore's rewards, which is that of its query tokens.
    """

    layout: Literal["lora", "comfyui", "transformer", "descore"]
    facts: Sequence[str]
    file: str = ""
    second_file: str = ""
    parts: tuple[str, ...] = ("transformer",)
    pipeline: str = "WanPipeline"

    @property
    def task(self) -> str:
        """The hub's name of what a generator does."""
        images = self.pipeline == "WanImageToVideoPipeline"
        return "image-to-video" if images else "text-to-video"

    query_id: int = 0
    rewards: int = 1


def model_card(
    exported: ExportedFiles,
    run: Provenance,
    *,
    base_model: str | None,
    repo_id: str | None,
) -> str:
    """Return the card's Markdown.

    ``base_model`` and ``repo_id`` are hub names; without them the commands have blanks.
    """
    from huggingface_hub import ModelCard, ModelCardData

    # What the hub reads.
    is_descore = exported.layout == "descore"
    task = "video-text-to-text" if is_descore else exported.task
    tags = [tag.replace("text-to-video", task) for tag in TAGS[exported.layout]]
    if run.algorithm:
        tags.append(run.algorithm.partition(",")[0].lower().replace(" ", "-"))
    relation = "adapter" if exported.layout in ("lora", "comfyui") else "finetune"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        library_name="transformers" if is_descore else "diffusers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(tags)),
    )

    # What people read.
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=TITLES[exported.layout],
        layout=exported.layout,
        exported=exported,
        run=run,
        base=base_model or BASE_BLANK,
        place=repo_id or FOLDER_BLANK,
        repo_id=repo_id,
    )
    # A setting could be the value of a token.
    return hide_secrets(str(card).rstrip() + "\n")
