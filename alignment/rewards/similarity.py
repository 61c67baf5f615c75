"""Similarity of frames and prompt by a CLIP or SigLIP, frame by frame, without motion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignment.rewards.frames import evenly_spaced, mean_of_best
from common.files import TRANSFORMERS_PATTERNS, model_folder
from common.memory import AdaptiveBatcher, default_device
from common.strict_loading import errors_of, load_pretrained
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor


class Similarity:
    """MEAN over frames of the cosine between image and text embedding, in [-1, 1].

    checkpoint  The folder or hub name of a CLIPModel or SiglipModel with tokenizer and image
                processor.
    frames      The number of evenly spaced frames to score, all of a shorter video.
    best        The share of frames that count, those that fit best: 0.3 forgives a scene that
                comes late.
    batch       Images of a video per forward; halved for good when memory runs out.

    ``fps`` plays no part. Prompts longer than the model reads are cut, as its tokenizer does.
    Images are prepared by transformers' processor in its PIL version.
    """

    name = "similarity"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        frames: int = 8,
        best: float = 1.0,
        batch: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        if frames < 1 or batch < 1 or not 0 < best <= 1:
            raise ValueError(
                "similarity needs frames, batch >= 1 and best in (0, 1], "
                f"got {frames}, {batch}, {best}"
            )
        self.frames = frames
        self.best = best
        self.batcher = AdaptiveBatcher(batch, what="images of the similarity reward")
        self.device = device or default_device()

        # the model, its tokenizer and its image processor
        folder = model_folder(checkpoint, "config.json", patterns=TRANSFORMERS_PATTERNS)
        model = load_pretrained(
            AutoModel,
            folder,
            dtype=getattr(torch, dtype),
            device=self.device,
        )
        self.model = model.requires_grad_(requires_grad=False).eval()
        with errors_of(folder, "tokenizer and image processor"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        longest = self.model.config.text_config.max_position_embeddings
        self.max_length = min(longest, self.tokenizer.model_max_length)
        # SigLIP was trained on padded texts without a mask; CLIP finds a text's end by itself
        self.pads = self.model.config.model_type.startswith("siglip")

    @torch.no_grad()
    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
        *,
        fps: float,
    ) -> Score:
        frames = evenly_spaced(video_BTYXC.shape[1], self.frames)
        # a video and a text at a time: the score of a video does not depend on its batch
        cosines = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            image_KD = self._embed_images(video_TYXC[frames])
            cosines.append(image_KD @ self._embed_text(prompt))
        return Score(mean_of_best(torch.stack(cosines), self.best).cpu())

    def _embed_images(self, picture_NYXC: Tensor) -> Tensor:
        """Image embeddings of length 1, (N, D)."""

        def embed(part_NYXC: Tensor) -> Tensor:
            images = list(part_NYXC.cpu().numpy())
            pixels = self.processor(images=images, return_tensors="pt").pixel_values
            pixels = pixels.to(self.device, self.model.dtype)
            output = self.model.get_image_features(pixel_values=pixels)
            return torch.nn.functional.normalize(output.pooler_output.float(), dim=1)

        return self.batcher.over(embed, picture_NYXC)

    def _embed_text(self, prompt: str) -> Tensor:
        """The text embedding of length 1, (D,)."""
        tokens = self.tokenizer(
            [prompt],
            padding="max_length" if self.pads else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        inputs = {"input_ids": tokens["input_ids"].to(self.device)}
        if not self.pads and "attention_mask" in tokens:
            inputs["attention_mask"] = tokens["attention_mask"].to(self.device)
        output = self.model.get_text_features(**inputs)
        return torch.nn.functional.normalize(output.pooler_output.float(), dim=1)[0]
