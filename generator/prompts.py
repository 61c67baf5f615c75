"""Prompt embeddings exactly as `WanPipeline.encode_prompt` makes them, each computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline
    from torch import Tensor


class PromptCache:
    """Prompt text -> embedding, kept on the CPU for the whole run.

    The stock pipeline cleans the text, encodes it and sets everything after its last token to zero. Wan's
    cross-attention has no mask, so these zeros are seen by the model: `get` returns the full padded length. Only the
    rows before the padding are kept: for umt5-xxl some 0.4 MB a prompt instead of 4 MB.
    """

    def __init__(self, pipeline: WanPipeline, *, max_length: int) -> None:
        self._pipeline = pipeline
        self._max_length = max_length
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not yet in the cache.

        One at a time: an embedding must not depend, even in its last bit, on which prompts were encoded beside it.
        Raises RuntimeError for a new prompt when the text encoder has been freed.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt in self._rows:
                continue
            if self._pipeline.text_encoder is None:
                raise RuntimeError(
                    f"the text encoder has been freed and this prompt was never encoded: {prompt!r}"
                )
            padded_1LD, _ = self._pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_length,
            )
            used = int(padded_1LD[0].any(dim=1).nonzero().max()) + 1
            self._rows[prompt] = padded_1LD[0, :used].cpu().clone()

    def get(
        self, prompts: Sequence[str], *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """(B, max_length, D), one row block per prompt, zero after its last token. Encodes what is missing."""
        self.encode(prompts)
        width = self._rows[prompts[0]].shape[1]
        embeds_BLD = torch.zeros(len(prompts), self._max_length, width, dtype=dtype)
        for embed_LD, prompt in zip(embeds_BLD, prompts, strict=True):
            rows = self._rows[prompt]
            embed_LD[: len(rows)] = rows
        return embeds_BLD.to(device)

    @contextmanager
    def given(self, embedding_LD: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, these prompts are in the cache, as `rows_of` gave them out; those it had already stay its own."""
        new = {
            prompt: rows
            for prompt, rows in embedding_LD.items()
            if prompt not in self._rows
        }
        self._rows |= new
        try:
            yield
        finally:
            for prompt in new:
                del self._rows[prompt]

    def rows_of(self, prompt: str) -> Tensor:
        """(L, D), the prompt's embedding without its padding, on the CPU. Encodes it if it is new."""
        self.encode([prompt])
        return self._rows[prompt]

    def free_text_encoder(self) -> None:
        """Let go of the text encoder (11 GB for umt5-xxl in bf16). Cached prompts keep working."""
        self._pipeline.text_encoder = None
