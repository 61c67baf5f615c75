"""Write chains of thought (CoTs) in batches, and read rewards off the same KV cache.

Slots of the cache: [prompt, padded on the right][one slot per generated token][one slot per
query token]. M-RoPE positions are given explicitly, and the slots of padding, end-of-turn and
finished rows are masked out. So `rewards_from_cache` feeds the query tokens only, and equals
the full forward over [prompt, video, CoT, <Reward>].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common import progress
from common.distributed import any_rank, seeded_generator
from rm.config import Generation
from rm.cuda_graph import CapturedFunction
from rm.kv_cache import KvCache, rounded_up
from rm.model import Batch, DeScore
from rm.packed import PackedCot


@dataclass(frozen=True)
class GeneratedCots:
    """Generated CoTs and the state of the model after them.

    The tokens, lengths and ends are on the CPU, everything else is on the model's device.

    prompt_BL   long, the ids of the prompts, padded on the right.
    token_BL    long, without end-of-turn tokens, padded with the pad id; L is the length of
                the longest CoT.
    length_B    The number of tokens of each CoT.
    finished_B  bool, True where the CoT ended by itself.
    cache       Keys and values of K slots.
    mask_BK     bool, True where a cache slot belongs to the sequence.
    position_B  The M-RoPE position of the next token.
    hidden_BD   The hidden state of the last token that was fed.
    """

    prompt_BL: Tensor
    token_BL: Tensor
    length_B: Tensor
    finished_B: Tensor
    cache: KvCache
    mask_BK: Tensor
    position_B: Tensor
    hidden_BD: Tensor

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
    prompts = _read_prompts(model, batch.to(model.device), copies)
    return _write(model, prompts, how, seeds)


@torch.no_grad()
def extend(
    model: DeScore,
    cots: GeneratedCots,
    rows: Sequence[int],
    how: Generation,
    *,
    seeds: Sequence[int] | None = None,
) -> GeneratedCots:
    """Go on with the unfinished CoTs ``rows`` up to ``how.max_new_tokens``, now larger.

    The result holds these rows only, with the tokens that `generate` writes under this limit.
    ``seeds`` are the rows' seeds. The cache is cut to the rows, so ``cots`` is used up.
    """
    # Memory of the finished rows is free from here on.
    cots.cache.select(rows)
    row_B = torch.tensor(rows, device=model.device)
    host_row_B = torch.tensor(rows)
    start = replace(
        cots,
        prompt_BL=cots.prompt_BL[row_B],
        token_BL=cots.token_BL[host_row_B],
        length_B=cots.length_B[host_row_B],
        finished_B=cots.finished_B[host_row_B],
        mask_BK=cots.mask_BK[row_B],
        position_B=cots.position_B[row_B],
        hidden_BD=cots.hidden_BD[row_B],
    )
    return _write(model, start, how, seeds)


@torch.no_grad()
def rewards_from_cache(model: DeScore, cots: GeneratedCots) -> Tensor:
    """Compute rewards (B, K) in fp32 by feeding the K query tokens after each CoT.

    One forward of K tokens, which leaves the cache as it was. An unfinished CoT gets a reward
    too; the caller decides whether it counts.
    """
    query_K = model.query_id_K
    count = len(query_K)
    offset_K = torch.arange(count, device=model.device)
    position_BK = cots.position_B.unsqueeze(1) + offset_K
    token_BK = query_K.expand_as(position_BK)

    # A query token sees the sequence, itself and the query tokens before it.
    shape = (len(token_BK), count, count)
    before_BKK = torch.ones(shape, dtype=torch.bool, device=model.device).tril()
    sequence_BKK = cots.mask_BK.unsqueeze(1).expand(-1, count, -1)
    mask_B1KK = torch.cat([sequence_BKK, before_BKK], -1).unsqueeze(1)
    cots.cache.reserve(count)
    hidden_BKD = _feed(model, token_BK, position_BK, mask_B1KK, cots.cache)
    return model.reward_from_hidden(hidden_BKD)


def _read_prompts(model: DeScore, batch: Batch, copies: int) -> GeneratedCots:
    """Run the prompts through the model once; ``copies`` CoTs of each, still empty."""
    from transformers import DynamicCache

    # A single forward fills the cache.
    cache = DynamicCache(config=model.backbone.config.text_config)
    row_B = torch.arange(len(batch.ids_BL), device=model.device)
    hidden_BLD = model.hidden(batch, past_key_values=cache, use_cache=True)
    hidden_BD = hidden_BLD[row_B, batch.last_B]
    # The last prompt token is text, so its three M-RoPE rows are equal.
    position_B = batch.position_3BL[0, row_B, batch.last_B] + 1

    # Every CoT has its copy of everything.
    prompt_BL = batch.ids_BL.repeat_interleave(copies, 0)
    slots = rounded_up(prompt_BL.shape[1] + 1)
    length_B = torch.zeros(len(prompt_BL), dtype=torch.long)
    return GeneratedCots(
        prompt_BL=prompt_BL,
        token_BL=torch.zeros(len(prompt_BL), 0, dtype=torch.long),
        length_B=length_B,
        finished_B=torch.zeros_like(length_B, dtype=torch.bool),
        cache=KvCache.of_prompts(cache, copies, slots),
        mask_BK=batch.mask_BL.bool().repeat_interleave(copies, 0),
        position_B=position_B.repeat_interleave(copies, 0),
        hidden_BD=hidden_BD.repeat_interleave(copies, 0),
    )


def _write(
    model: DeScore,
    start: GeneratedCots,
    how: Generation,
    seeds: Sequence[int] | None,
) -> GeneratedCots:
    """Go on with unfinished CoTs until all have ended or have ``how.max_new_tokens``."""
    if (how.temperature > 0) != (seeds is not None):
        raise ValueError(
            "seeds go with a temperature above 0, "
            f"got temperature={how.temperature} and seeds={seeds}"
        )
    # 1. Choose a token, feed it, until every row has ended.
    decoder = _Decoder(model, start, how, seeds)
    decoder.run()

    # 2. To the host, in a single wait; a few tokens may have been fed after the last end.
    written = start.token_BL.shape[1]
    length_B = decoder.length_B.cpu()
    longest = int(length_B.max())
    used = start.mask_BK.shape[1] + longest - written
    start.cache.cut(used)
    return replace(
        start,
        token_BL=decoder.token_BL[:, :longest].cpu(),
        length_B=length_B,
        finished_B=~decoder.alive_B.cpu(),
        mask_BK=decoder.mask_BK[:, :used],
        position_B=start.position_B + decoder.length_B - written,
        hidden_BD=decoder.hidden_BD,
    )


class _Decoder:
    """Writes CoTs token by token. Its state is tensors on the device, changed in place.

    No step waits for the device, which can so run behind the host. On a GPU a step is captured
    as a CUDA graph. Whether all rows have ended is looked up every `steps_per_look` tokens.
    """

    def __init__(
        self,
        model: DeScore,
        start: GeneratedCots,
        how: Generation,
        seeds: Sequence[int] | None,
    ) -> None:
        device = model.device
        self.model = model
        self.cache = start.cache
        size, written = start.token_BL.shape
        self.more = how.max_new_tokens - written

        # The state of every row, with room for the new tokens.
        token_BL = start.token_BL.to(device)
        seen_BL = torch.cat([start.prompt_BL, token_BL], 1)
        self.sampler = _TokenSampler(model, seen_BL, how, seeds)
        self.token_BL = nn.functional.pad(token_BL, (0, self.more), value=model.pad_id)
        # The mask has a place for every slot that the cache may come to have.
        used = start.mask_BK.shape[1]
        places = rounded_up(used + self.more + len(model.query_ids))
        self.mask_BK = nn.functional.pad(start.mask_BK, (0, places - used), value=False)
        self.length_B = start.length_B.to(device)
        self.alive_B = torch.ones(size, dtype=torch.bool, device=device)
        self.hidden_BD = start.hidden_BD.clone()

        # Where the next token goes. These numbers are read by kernels only.
        self.position_B = start.position_B.clone()
        self.step_1 = torch.tensor([written], device=device)

    def run(self) -> None:
        """Write up to ``more`` tokens per row."""
        model = self.model
        captured = None
        self.cache.whole = can_capture(model)
        if self.cache.whole:
            captured = CapturedFunction(self.step)
        steps_per_look = steps_between_looks(model.device)
        for number in range(1, self.more + 1):
            is_due = number % steps_per_look == 0
            if self.cache.reserve(1) and captured is not None:
                captured.reset()

            # A step as one graph, or as two parts: the look between them saves a forward.
            if captured is None:
                self.choose()
                if is_due and self._all_ended():
                    break
                self.feed()
            else:
                captured()
                if is_due and self._all_ended():
                    break
            self.cache.advance(1)
            progress.tick()
        self.cache.whole = False

    def step(self) -> None:
        """Write a token."""
        self.choose()
        self.feed()

    def choose(self) -> None:
        """Choose the next token of every row; rows that have ended get the pad id."""
        chosen_B = self.sampler(_logits(self.model, self.hidden_BD), self.step_1)
        self.alive_B &= chosen_B != self.model.end_id
        token_B = torch.where(self.alive_B, chosen_B, self.model.pad_id)
        self.token_BL.index_copy_(1, self.step_1, token_B.unsqueeze(1))
        self.length_B += self.alive_B

    def feed(self) -> None:
        """Feed the chosen token to the language model."""
        # The new slot is hidden from its own row where the row has ended.
        cache = self.cache
        self.mask_BK.index_copy_(1, cache.slot_1, self.alive_B.unsqueeze(1))
        seen = cache.slots if cache.whole else cache.used + 1
        hidden_B1D = _feed(
            self.model,
            self.token_BL.index_select(1, self.step_1),
            self.position_B.unsqueeze(1),
            self.mask_BK[:, None, None, :seen],
            cache,
        )
        self.hidden_BD.copy_(hidden_B1D[:, 0])

        # On to the next place.
        self.position_B += 1
        self.step_1 += 1
        cache.slot_1 += 1

    def _all_ended(self) -> bool:
        """Wait for the device: has every row ended? With a sharded model, on every rank."""
        if self.model.sharded:
            return not any_rank(self.alive_B)
        return not self.alive_B.any()


def can_capture(model: DeScore) -> bool:
    """Whether a step can be a CUDA graph; gathering the weights of a sharded model cannot."""
    return model.device.type == "cuda" and not model.sharded


def steps_between_looks(device: torch.device) -> int:
    """How many tokens are written between two looks whether all rows have ended.

    A look waits for the device, and a CPU never has to be waited for.
    """
    return 1 if device.type == "cpu" else 16


def _feed(
    model: DeScore,
    token_BL: Tensor,
    position_BL: Tensor,
    mask_B1LK: Tensor,
    cache: KvCache,
) -> Tensor:
    """Feed a few more text tokens per row to the language model; hidden states (B, L, D).

    A mask of four dimensions is taken as it is. One of two would be looked at on the host.
    """
    output = model.backbone.model.language_model(
        input_ids=token_BL,
        position_ids=position_BL.unsqueeze(0).expand(3, -1, -1),
        attention_mask=mask_B1LK,
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
        seen_BL: Tensor,
        how: Generation,
        seeds: Sequence[int] | None,
    ) -> None:
        self.how = how
        self.banned_V = model.banned_ids().to(model.device)

        # Tokens that are already in the sequence, for the repetition penalty.
        self.seen_BV: Tensor | None = None
        if how.repetition_penalty != 1.0:
            shape = (len(seen_BL), len(self.banned_V))
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=model.device)
            self.seen_BV.scatter_(1, seen_BL, value=True)

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

    def __call__(self, logits_BV: Tensor, step_1: Tensor) -> Tensor:
        """Choose; ``step_1`` is the number of the token, on the device."""
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
            chosen_B = self._draw(logits_BV, self.uniform_BS.index_select(1, step_1))
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
