"""Write chains of thought (CoTs) in batches, and read rewards off the same KV cache.

Slots of the cache: [prompt, padded on the right][one slot per generated token][one slot per
query token]. M-RoPE positions are given explicitly, and the slots of padding, end-of-turn and
finished rows are masked out. So `rewards_from_cache` feeds the query tokens only, and equals
the full forward over [prompt, video, CoT, <Reward>].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import progress
from common.distributed import any_rank, seeded_generator
from rm.config import Generation
from rm.model import Batch, DeScore
from rm.packed import PackedCot

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class GeneratedCots:
    """Generated CoTs and the state of the model after them.

    token_BL    long, without end-of-turn tokens, padded with the pad id; L is the length of
                the longest CoT, at least 1.
    length_B    The number of tokens of each CoT.
    finished_B  bool, True where the CoT ended by itself.
    mask_BK     bool, True where a cache slot belongs to the sequence.
    position_B  The M-RoPE position of the next token.
    """

    token_BL: Tensor
    length_B: Tensor
    finished_B: Tensor
    cache: Cache
    mask_BK: Tensor
    position_B: Tensor

    def ids(self, row: int) -> list[int]:
        """Token ids of a CoT."""
        return self.token_BL[row, : int(self.length_B[row])].tolist()

    def cot(self, row: int) -> PackedCot:
        """A CoT as stage 2 packs it."""
        return PackedCot(tuple(self.ids(row)), bool(self.finished_B[row]))


@torch.no_grad()
def generate(
    model: DeScore,
    batch: Batch,
    how: Generation,
    *,
    seeds: Sequence[int] | None = None,
    copies: int = 1,
) -> GeneratedCots:
    """Continue every sequence of ``batch`` (made with ``query=False``) to its end of turn.

    Writes ``copies`` CoTs of each sequence, rows in the order (sequence, copy). The prompt is
    read once and its cache copied; the vision tower runs once.

    Temperature 0 is greedy. Otherwise the draws of row b depend on ``seeds[b]`` and the row's
    probabilities only, not on the rest of the batch. `<Reward>`, free rows of the vocabulary
    and visual placeholders are never chosen. With a sharded model all ranks stop together, and
    tokens fed after the end of a row are masked out.

    Raises ValueError for a temperature above 0 without seeds, or seeds with temperature 0.
    """
    if (how.temperature > 0) != (seeds is not None):
        raise ValueError(
            "seeds go with a temperature above 0, "
            f"got temperature={how.temperature} and seeds={seeds}"
        )

    # 1. Read the prompts and copy them, with their cache, for every CoT.
    batch = batch.to(model.device)
    cache, *rows = _read_prompts(model, batch, copies)
    ids_BL, prompt_mask_BL, prompt_position_B, logits_BV = rows
    size, prompt_length = ids_BL.shape
    queries = len(model.query_ids)
    slots = prompt_length + how.max_new_tokens + queries

    # The state of every row.
    mask_BK = torch.zeros(size, slots, dtype=torch.bool, device=model.device)
    mask_BK[:, :prompt_length] = prompt_mask_BL
    token_BL = torch.full((size, how.max_new_tokens), model.pad_id, device=model.device)
    length_B = torch.zeros(size, dtype=torch.long, device=model.device)
    alive_B = torch.ones(size, dtype=torch.bool, device=model.device)
    sampler = _TokenSampler(model, ids_BL, how, seeds)

    # 2. Choose a token, feed it, until every row has ended.
    for step in range(how.max_new_tokens):
        chosen_B = sampler(logits_BV, step)
        alive_B = alive_B & (chosen_B != model.end_id)
        any_alive = any_rank(alive_B) if model.sharded else alive_B.any()
        if not any_alive:
            break
        token_BL[:, step] = torch.where(alive_B, chosen_B, model.pad_id)
        length_B += alive_B
        slot = prompt_length + step
        mask_BK[:, slot] = alive_B
        position_B = prompt_position_B + step + 1
        hidden_B1D = _feed(
            model,
            token_BL[:, step : step + 1],
            position_B.unsqueeze(1),
            mask_BK[:, : slot + 1],
            cache,
        )
        progress.tick()
        if step + 1 < how.max_new_tokens:
            logits_BV = _logits(model, hidden_B1D[:, 0])

    # 3. Cut everything to what was used; `rewards_from_cache` goes on from here.
    used = cache.get_seq_length()
    longest = max(int(length_B.max()), 1)
    return GeneratedCots(
        token_BL=token_BL[:, :longest],
        length_B=length_B,
        finished_B=~alive_B,
        cache=cache,
        mask_BK=mask_BK[:, : used + queries].clone(),
        position_B=prompt_position_B + 1 + length_B,
    )


@torch.no_grad()
def rewards_from_cache(model: DeScore, cots: GeneratedCots) -> Tensor:
    """Compute rewards (B, K) in fp32 by feeding the K query tokens after each CoT.

    One forward of K tokens. It adds K slots to the cache, so call it only once. An unfinished
    CoT gets a reward too; the caller decides whether it counts.
    """
    query_K = torch.tensor(model.query_ids, device=model.device)
    mask_BK = cots.mask_BK.clone()
    mask_BK[:, -len(query_K) :] = True
    offset_K = torch.arange(len(query_K), device=model.device)
    position_BK = cots.position_B.unsqueeze(1) + offset_K
    token_BK = query_K.expand_as(position_BK)
    hidden_BKD = _feed(model, token_BK, position_BK, mask_BK, cots.cache)
    return model.reward_from_hidden(hidden_BKD)


def _read_prompts(
    model: DeScore, batch: Batch, copies: int
) -> tuple[Cache, Tensor, Tensor, Tensor, Tensor]:
    """Run the prompts through the model once, then repeat everything ``copies`` times.

    Returns the KV cache and by row: the ids, their mask, the M-RoPE position of the last
    token, and the logits of the next.
    """
    from transformers import DynamicCache

    # A single forward fills the cache.
    cache = DynamicCache(config=model.backbone.config.text_config)
    row_B = torch.arange(len(batch.ids_BL), device=model.device)
    hidden_BLD = model.hidden(batch, past_key_values=cache, use_cache=True)
    logits_BV = _logits(model, hidden_BLD[row_B, batch.last_B])
    # The last prompt token is text, so its three M-RoPE rows are equal.
    position_B = batch.position_3BL[0, row_B, batch.last_B]
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    rows = (batch.ids_BL, batch.mask_BL.bool(), position_B, logits_BV)
    return cache, *(row.repeat_interleave(copies, 0) for row in rows)


def _feed(
    model: DeScore, token_BL: Tensor, position_BL: Tensor, mask_BK: Tensor, cache: Cache
) -> Tensor:
    """Feed a few more text tokens per row to the language model; hidden states (B, L, D)."""
    output = model.backbone.model.language_model(
        input_ids=token_BL,
        position_ids=position_BL.unsqueeze(0).expand(3, -1, -1),
        attention_mask=mask_BK,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def _logits(model: DeScore, hidden_BD: Tensor) -> Tensor:
    return model.backbone.lm_head(hidden_BD).float()


class _TokenSampler:
    """Chooses a token (B,) from the logits (B, V) of a step."""

    def __init__(
        self,
        model: DeScore,
        prompt_BL: Tensor,
        how: Generation,
        seeds: Sequence[int] | None,
    ) -> None:
        self.how = how
        self.banned_V = model.banned_ids().to(model.device)

        # Tokens that are already in the sequence, for the repetition penalty.
        self.seen_BV: Tensor | None = None
        if how.repetition_penalty != 1.0:
            shape = (len(prompt_BL), len(self.banned_V))
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=model.device)
            self.seen_BV.scatter_(1, prompt_BL, value=True)

        # One uniform number per token, drawn on the CPU: equal on every kind of machine.
        self.uniform_BS: Tensor | None = None
        if seeds is not None:
            draws = [
                torch.rand(
                    how.max_new_tokens,
                    generator=seeded_generator(seed, "cot"),
                    dtype=torch.float64,
                )
                for seed in seeds
            ]
            self.uniform_BS = torch.stack(draws).to(model.device)

    def __call__(self, logits_BV: Tensor, step: int) -> Tensor:
        # Weaken the tokens that are already in the sequence.
        if self.seen_BV is not None:
            penalty = self.how.repetition_penalty
            weakened_BV = torch.where(
                logits_BV > 0, logits_BV / penalty, logits_BV * penalty
            )
            logits_BV = torch.where(self.seen_BV, weakened_BV, logits_BV)
        logits_BV = logits_BV.masked_fill(self.banned_V, -torch.inf)

        # Greedily, or a draw.
        if self.uniform_BS is None:
            chosen_B = logits_BV.argmax(-1)
        else:
            chosen_B = self._draw(logits_BV, self.uniform_BS[:, step : step + 1])
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, chosen_B.unsqueeze(1), value=True)
        return chosen_B

    def _draw(self, logits_BV: Tensor, uniform_B1: Tensor) -> Tensor:
        """Invert the cumulative distribution; right=True skips ids of probability 0."""
        scaled_BV = logits_BV.double() / self.how.temperature
        cumulative_BV = scaled_BV.softmax(-1).cumsum(-1)
        point_B1 = uniform_B1 * cumulative_BV[:, -1:]
        chosen_B1 = torch.searchsorted(cumulative_BV, point_B1, right=True)
        return chosen_B1.squeeze(1).clamp(max=len(self.banned_V) - 1)
