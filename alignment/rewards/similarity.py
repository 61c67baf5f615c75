"""How well frames fit the prompt, by a CLIP or SigLIP: what a picture model sees, frame by frame, without motion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.memory import AdaptiveBatcher
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor


class Similarity:
    """MEAN over frames of the cosine between image and text embedding, in [-1, 1].

    checkpoint  folder or hub name of a CLIPModel or SiglipModel with tokenizer and image processor
    frames      that are looked at, evenly spaced, first and last included; a shorter video is looked at whole
    best        share of the frames that count, those that fit best: 0.3 forgives a scene that comes late
    batch       images of a video at once; halved for good when memory runs out

    ``fps`` plays no part. Longer prompts than the model reads are cut, as its tokenizer does. Images are prepared by
    transformers' own processor in its PIL version.
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
                f"similarity needs frames, batch >= 1 and best in (0, 1], got {frames}, {batch}, {best}"
            )
        self.frames, self.best, self.portions = (
            frames,
            best,
            AdaptiveBatcher(batch, what="images before the judge"),
        )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.requires_grad_(requires_grad=False).eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        limit = self.model.config.text_config.max_position_embeddings
        self.limit = min(limit, self.tokenizer.model_max_length)
        # SigLIP was trained on texts padded to the end, CLIP finds a text's end by itself
        self.padding = (
            "max_length" if self.model.config.model_type.startswith("siglip") else True
        )

    @torch.no_grad()
    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        count = min(self.frames, video_BTYXC.shape[1])
        chosen = torch.linspace(0, video_BTYXC.shape[1] - 1, count).round().long()
        # one video and one text at a time: what a video scores does not depend on its batch, to the last bit
        fits = [
            self._images(video_TYXC[chosen]) @ self._text(prompt)
            for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True)
        ]
        fit_BK = torch.stack(fits)
        kept = max(1, math.ceil(self.best * count - 1e-9))
        return Score(fit_BK.topk(kept, dim=1).values.mean(dim=1).cpu())

    def _images(self, picture_NYXC: Tensor) -> Tensor:
        """(N, D), of length 1."""

        def features(part_NYXC: Tensor) -> Tensor:
            pixels = self.processor(
                images=list(part_NYXC.cpu().numpy()), return_tensors="pt"
            ).pixel_values
            out = self.model.get_image_features(
                pixel_values=pixels.to(self.device, self.model.dtype)
            )
            return torch.nn.functional.normalize(out.pooler_output.float(), dim=1)

        return self.portions.over(features, picture_NYXC)

    def _text(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(
            [prompt],
            padding=self.padding,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        )
        options = {
            name: tokens[name].to(self.device)
            for name in ("input_ids", "attention_mask")
            if name in tokens
        }
        if self.padding == "max_length":
            options.pop("attention_mask", None)  # its padding is part of the text
        out = self.model.get_text_features(**options)
        return torch.nn.functional.normalize(out.pooler_output.float(), dim=1)[0]
