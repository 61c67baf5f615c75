"""Writing chains of thought, many at a time, and reading the reward off the same KV cache.

Slots of the cache: [prompt, padded on the right][one slot per generated token][one per query token]. Slots are places,
not positions: M-RoPE positions are given explicitly and padding, end-of-turn and idle slots are masked out. So
`rewards_from_cache` feeds one token and equals the full forward over [prompt, video, CoT, <Reward>].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.distributed import any_rank, seeded_generator
from rm.config import Generation
from rm.model import Batch, DeScore

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class GeneratedCots:
    """Generated chains of thought and where the model stands after them.

    token_BL    long, L the longest chain (at least 1), without end-of-turn token, padded with the pad id
    length_B    tokens of each chain; finished_B  bool: it ended by itself
    mask_BK     bool, which cache slots belong to the sequence; position_B  M-RoPE position of the next token
    """

    token_BL: Tensor
    length_B: Tensor
    finished_B: Tensor
    cache: Cache
    mask_BK: Tensor
    position_B: Tensor

    def ids(self, row: int) -> list[int]:
        return self.token_BL[row, : int(self.length_B[row])].tolist()


@torch.no_grad()
def generate(
    model: DeScore,
    batch: Batch,
    how: Generation,
    *,
    seeds: Sequence[int] | None = None,
    copies: int = 1,
) -> GeneratedCots:
    """Continue every sequence of ``batch`` (made with ``query=False``) until its end of turn.

    ``copies`` chains of each sequence, rows in the order (sequence, copy); the prompt is read once, its cache copied.
    Greedy at temperature 0. Otherwise row b's draws depend on ``seeds[b]`` and its own probabilities, never on who
    else is in the batch. `<Reward>`, free rows of the vocabulary and visual placeholders are never chosen. The vision
    tower runs once, the vocabulary head once per token. Of a sharded model all ranks stop together; what a rank feeds
    after the end of its own chains is masked out.
    """
    from transformers import DynamicCache

    if (how.temperature > 0) != (seeds is not None):
        raise ValueError(
            f"seeds go with a temperature above 0, got temperature={how.temperature} and seeds={seeds}"
        )
    batch = batch.to(model.device)
    size, prompt_length = len(batch.ids_BL) * copies, batch.ids_BL.shape[1]
    cache = DynamicCache(config=model.backbone.config.text_config)
    row_B = torch.arange(len(batch.ids_BL), device=model.device)
    logits_BV = _logits(
        model,
        model.hidden(batch, past_key_values=cache, use_cache=True)[row_B, batch.last_B],
    )
    last_B = batch.position_3BL[
        0, row_B, batch.last_B
    ]  # a text token: its three rows are equal
    prompt_BL, prompt_mask_BL = batch.ids_BL, batch.mask_BL.bool()
    if copies > 1:
        cache.batch_repeat_interleave(copies)
        logits_BV, last_B, prompt_BL, prompt_mask_BL = (
            x.repeat_interleave(copies, 0)
            for x in (logits_BV, last_B, prompt_BL, prompt_mask_BL)
        )
    queries = len(model.query_ids)
    mask_BK = torch.zeros(
        size,
        prompt_length + how.max_new_tokens + queries,
        dtype=torch.bool,
        device=model.device,
    )
    mask_BK[:, :prompt_length] = prompt_mask_BL
    token_BL = torch.full((size, how.max_new_tokens), model.pad_id, device=model.device)
    length_B = torch.zeros(size, dtype=torch.long, device=model.device)
    alive_B = torch.ones(size, dtype=torch.bool, device=model.device)
    choose = _Chooser(model, prompt_BL, how, seeds)

    for step in range(how.max_new_tokens):
        chosen_B = choose(logits_BV, step)
        alive_B = alive_B & (chosen_B != model.end_id)
        if not (any_rank(alive_B) if model.sharded else alive_B.any()):
            break
        token_BL[:, step] = torch.where(alive_B, chosen_B, model.pad_id)
        length_B += alive_B
        slot = prompt_length + step
        mask_BK[:, slot] = alive_B
        position_B1 = (last_B + step + 1).unsqueeze(1)
        hidden_B1D = _feed(
            model,
            token_BL[:, step : step + 1],
            position_B1,
            mask_BK[:, : slot + 1],
            cache,
        )
        if step + 1 < how.max_new_tokens:
            logits_BV = _logits(model, hidden_B1D[:, 0])

    used = cache.get_seq_length()
    longest = max(int(length_B.max()), 1)
    return GeneratedCots(
        token_BL[:, :longest],
        length_B,
        ~alive_B,
        cache,
        mask_BK[:, : used + queries].clone(),
        last_B + 1 + length_B,
    )


@torch.no_grad()
def rewards_from_cache(model: DeScore, chains: GeneratedCots) -> Tensor:
    """Rewards (B, K), fp32: the queries fed right after each chain's last token. One forward of K tokens.

    Uses the cache up (K slots are added): call it once. An unfinished chain has a reward too; whether it counts is
    the caller's business.
    """
    query_K = torch.tensor(model.query_ids, device=model.device)
    mask_BK = chains.mask_BK.clone()
    mask_BK[:, -len(query_K) :] = True
    position_BK = chains.position_B.unsqueeze(1) + torch.arange(
        len(query_K), device=model.device
    )
    return model.read_reward(
        _feed(model, query_K.expand_as(position_BK), position_BK, mask_BK, chains.cache)
    )


def _feed(
    model: DeScore, token_BL: Tensor, position_BL: Tensor, mask_BK: Tensor, cache: Cache
) -> Tensor:
    """A few more tokens per row through the language model, hidden (B, L, D). There is nothing visual in them."""
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


class _Chooser:
    """Logits (B, V) of one step -> token (B,)."""

    def __init__(
        self,
        model: DeScore,
        prompt_BL: Tensor,
        how: Generation,
        seeds: Sequence[int] | None,
    ) -> None:
        self.how = how
        self.banned_V = model.banned_ids().to(model.device)
        self.seen_BV: Tensor | None = None
        if how.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(
                len(prompt_BL),
                len(self.banned_V),
                dtype=torch.bool,
                device=model.device,
            )
            self.seen_BV.scatter_(1, prompt_BL, value=True)
        self.uniform_BS: Tensor | None = None
        if seeds is not None:
            # drawn on the CPU: one number per token, the same on every kind of machine
            draws = [
                torch.rand(
                    how.max_new_tokens,
                    generator=seeded_generator(s, "cot"),
                    dtype=torch.float64,
                )
                for s in seeds
            ]
            self.uniform_BS = torch.stack(draws).to(model.device)

    def __call__(self, logits_BV: Tensor, step: int) -> Tensor:
        penalty = self.how.repetition_penalty
        if self.seen_BV is not None:
            weakened_BV = torch.where(
                logits_BV > 0, logits_BV / penalty, logits_BV * penalty
            )
            logits_BV = torch.where(self.seen_BV, weakened_BV, logits_BV)
        logits_BV = logits_BV.masked_fill(self.banned_V, -torch.inf)
        if self.uniform_BS is None:
            chosen_B = logits_BV.argmax(-1)
        else:
            # inverse of the cumulative distribution; right=True skips ids of probability 0
            total_BV = (
                (logits_BV.double() / self.how.temperature).softmax(-1).cumsum(-1)
            )
            point_B1 = self.uniform_BS[:, step : step + 1] * total_BV[:, -1:]
            chosen_B = (
                torch.searchsorted(total_BV, point_B1, right=True)
                .squeeze(1)
                .clamp(max=len(self.banned_V) - 1)
            )
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, chosen_B.unsqueeze(1), value=True)
        return chosen_B
