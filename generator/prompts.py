"""PromptCache: prompt embeddings as `WanPipeline.encode_prompt` makes them, each computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import progress
from generator.given import given_entries

if TYPE_CHECKING:
    from diffusers import WanPipeline
    from torch import Tensor

    from generator.config import GeneratorConfig


def count_tokens(prompts: Sequence[str], folder: str | Path) -> list[int]:
    """Count the tokens of each prompt as the stock pipeline would read it without a limit.

    ``folder`` is that of the pipeline, of which only the tokenizer is loaded.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    # verbose: it would warn that its model cannot read so many tokens
    cleaned = [prompt_clean(prompt) for prompt in prompts]
    return [len(ids) for ids in tokenizer(cleaned, verbose=False).input_ids]


def describe_long_prompts(prompts: Sequence[str], cfg: GeneratorConfig) -> str:
    """Count the prompts that the text encoder cuts off, and name the first.

    Rewards read the whole prompt, so they would score what the generator never saw. Returns ""
    if no prompt is cut, or where the generator's folder has no tokenizer to count with.
    """
    if not (Path(cfg.path) / "tokenizer").is_dir():
        return ""
    limit = cfg.max_sequence_length
    long = []
    for prompt, tokens in zip(prompts, count_tokens(prompts, cfg.path), strict=True):
        if tokens > limit:
            long.append((prompt, tokens))
    if not long:
        return ""
    first, tokens = long[0]
    return (
        f"{len(long)} of {len(prompts)} prompts have more than the {limit} tokens that the text "
        f"encoder reads (generator.max_sequence_length): the generator does not see the rest, "
        f"rewards do. The first has {tokens}: {first!r:.80}"
    )


class PromptCache:
    """Maps a prompt to its embedding, on the CPU, for the length of a run.

    The stock pipeline cleans the text, encodes it and sets everything after its last token to
    zero. Wan's cross-attention has no mask, so the model sees these zeros: `get` returns the full
    padded length. Only the rows before the padding are stored: for umt5-xxl some 0.4 MB a prompt
    instead of 4 MB.
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

        Raises RuntimeError for a new prompt when the text encoder has been freed.
        """
        # each prompt alone: even its last bit must not depend on the rest of a batch
        for prompt in dict.fromkeys(prompts):
            if prompt in self._rows:
                continue
            if self._pipeline.text_encoder is None:
                raise RuntimeError(
                    f"the text encoder has been freed and this prompt was never encoded: {prompt!r}"
                )
            # The stock function cleans the text and zeroes the padding.
            padded_1LD, _ = self._pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_length,
            )
            # Store the rows up to the last that is not zero.
            used = int(padded_1LD[0].any(dim=1).nonzero().max()) + 1
            self._rows[prompt] = padded_1LD[0, :used].cpu().clone()
            progress.tick()

    def get(
        self,
        prompts: Sequence[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Embeddings (B, max_length, D), zero after the last token; encodes missing prompts."""
        self.encode(prompts)
        # Pad to the full length again.
        width = self._rows[prompts[0]].shape[1]
        embeds_BLD = torch.zeros(len(prompts), self._max_length, width, dtype=dtype)
        for index, prompt in enumerate(prompts):
            rows = self._rows[prompt]
            embeds_BLD[index, : len(rows)] = rows
        return embeds_BLD.to(device)

    def given(self, embedding_LD: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, these embeddings (from `rows_of`) are in the cache, unless it had its own."""
        return given_entries(self._rows, embedding_LD)

    def rows_of(self, prompt: str) -> Tensor:
        """Embedding of a prompt without its padding, (L, D) on the CPU."""
        self.encode([prompt])
        return self._rows[prompt]

    def free_text_encoder(self) -> None:
        """Free the text encoder (11 GB for umt5-xxl in bf16); cached prompts still work."""
        self._pipeline.text_encoder = None
        if torch.cuda.is_available():
            # for others on this GPU, such as vLLM: PyTorch would keep the memory
            torch.cuda.empty_cache()
