"""The forward of stage 2: several chains of thought (CoTs) about a video in one sequence.

A row is ``[chat, video][CoT_1 <Reward>][CoT_2 <Reward>] ... [CoT_G <Reward>]``. The attention
mask lets a CoT see the prompt and itself only, and the M-RoPE positions of every CoT continue
after the prompt. So each CoT gets the hidden states and gradients of a sequence of its own,
while prompt and video are computed once. The same forward gives the log-probabilities of the
CoT's tokens and the reward at its query: the query is last, so causal attention keeps it from
changing any hidden state before it.

The mask is dense (torch's attention, "sdpa" and "eager", takes it, FlashAttention does not) or
FlexAttention's, see `rm.block_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from common.distributed import max_over_ranks
from rm.block_attention import packed_mask
from rm.model import Batch, DeScore, rope_positions
from rm.prompt import Encoded
from rm.video import PreparedVideo

# The logits of a large vocabulary are the largest tensors of a step: compute so many at a time.
_TOKENS_PER_PART = 1024


@dataclass(frozen=True)
class PackedCot:
    """A sampled CoT: its token ids without end-of-turn, and whether it ended by itself."""

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Packed:
    """Rows of G CoTs each. T is the longest CoT with its end token; shorter ones are padded.

    batch       The input of `DeScore.hidden`, but for the mask of `rm.block_attention`.
    segment_BL  long, the CoT that a token belongs to, from 1 on; 0 is the prompt, -1 padding.
    before_BGT  The index of the hidden state that predicts token t.
    target_BGT  The token ids, with the end-of-turn token last if the CoT finished.
    token_BGT   bool, True where there is a token.
    query_BG    The index of the last query token of each CoT.
    """

    batch: Batch
    segment_BL: Tensor
    before_BGT: Tensor
    target_BGT: Tensor
    token_BGT: Tensor
    query_BG: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """Move every tensor to a device."""
        moved = {}
        for item in fields(self):
            moved[item.name] = getattr(self, item.name).to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedOutput:
    """Log-probabilities (B, G, T), 0 where there is no token, and rewards (B, G, K)."""

    log_prob_BGT: Tensor
    reward_BGK: Tensor


def packed_forward(
    model: DeScore, packed: Packed, *, temperature: float
) -> PackedOutput:
    """Compute log-probabilities and rewards of all CoTs in one forward of the backbone.

        log_prob_t = log softmax(logits_t / temperature)[token_t]

    over the ids that may be sampled.
    """
    # The hidden states, and the row that each entry of (B, G, T) belongs to.
    mask = packed_mask(model, packed.segment_BL)
    hidden_BLD = model.hidden(replace(packed.batch, mask_BL=mask))
    device = hidden_BLD.device
    row_B = torch.arange(len(hidden_BLD), device=device)
    row_B11 = row_B.view(-1, 1, 1)

    # Log-probabilities: gather the N hidden states that predict a token.
    token_BGT = packed.token_BGT
    row_N = row_B11.expand_as(token_BGT)[token_BGT]
    before_N = packed.before_BGT[token_BGT]
    log_prob_N = token_log_probs(
        model,
        hidden_BLD[row_N, before_N],
        packed.target_BGT[token_BGT],
        temperature=temperature,
    )
    zero_BGT = torch.zeros(token_BGT.shape, device=device)
    log_prob_BGT = zero_BGT.masked_scatter(token_BGT, log_prob_N)

    # Rewards: the linear head on the hidden states of the query tokens.
    query_BGK = packed.query_BG.unsqueeze(-1) - model.query_offset_K
    hidden_BGKD = hidden_BLD[row_B11, query_BGK]
    return PackedOutput(log_prob_BGT, model.reward_from_hidden(hidden_BGKD))


def token_log_probs(
    model: DeScore, hidden_ND: Tensor, target_N: Tensor, *, temperature: float
) -> Tensor:
    """Log-probabilities (N,) of tokens in fp32, with logits computed a part at a time.

    The backward computes the logits again. With a sharded model every rank makes equally
    many calls, some on empty parts, since each call gathers the vocabulary head.
    """
    banned_V = model.banned_ids().to(hidden_ND.device)

    def log_probs(hidden: Tensor, target: Tensor) -> Tensor:
        logits = model.backbone.lm_head(hidden).float()
        logits = logits.masked_fill(banned_V, -torch.inf) / temperature
        return -F.cross_entropy(logits, target, reduction="none")

    # The number of parts. A single part needs no second computation.
    count = max(1, math.ceil(len(hidden_ND) / _TOKENS_PER_PART))
    if model.sharded:
        count = int(max_over_ranks(count))
    recompute = torch.is_grad_enabled() and count > 1

    # Part by part.
    parts = []
    for i in range(count):
        first = i * _TOKENS_PER_PART
        last = first + _TOKENS_PER_PART
        hidden = hidden_ND[first:last]
        target = target_N[first:last]
        if recompute:
            log_prob = checkpoint(log_probs, hidden, target, use_reentrant=False)
        else:
            log_prob = log_probs(hidden, target)
        parts.append(log_prob)
    return torch.cat(parts)


def pack(
    model: DeScore,
    encoded: Sequence[Encoded],
    videos: Sequence[PreparedVideo],
    cots: Sequence[Sequence[PackedCot]],
) -> Packed:
    """Pack the G CoTs ``cots[b]`` behind the prompt ``encoded[b].prompt_ids``, for every row b."""
    rows = []
    for item, group in zip(encoded, cots, strict=True):
        rows.append(_pack_row(model, item.prompt_ids, group))
    ids_BL = _padded([row.ids for row in rows], model.pad_id)

    # A token sees its CoT and the prompt (segment 0), causally.
    segment_BL = _padded([row.segment for row in rows], -1)

    # Every CoT continues at the position after the prompt.
    grid_B3 = torch.tensor([video.grid for video in videos])
    position_3BL = rope_positions(
        ids_BL == model.video_pad_id,
        grid_B3,
        model.settings.merge_size,
    )
    shift_BL = _padded([row.shift for row in rows], 0)
    batch = Batch(
        ids_BL=ids_BL,
        mask_BL=(segment_BL >= 0).long(),
        position_3BL=position_3BL - shift_BL,
        last_B=torch.tensor([len(row.ids) - 1 for row in rows]),
        patches=torch.cat([video.patches for video in videos]),
        grid_B3=grid_B3,
    )

    # Where the CoTs are, padded to the longest of all rows.
    shape = (len(rows), len(cots[0]))
    before = [indices for row in rows for indices in row.before]
    targets = [ids for row in rows for ids in row.targets]
    lengths_BG = torch.tensor([len(ids) for ids in targets]).view(shape)
    target_BGT = _padded(targets, 0).unflatten(0, shape)
    return Packed(
        batch=batch,
        segment_BL=segment_BL,
        before_BGT=_padded(before, 0).unflatten(0, shape),
        target_BGT=target_BGT,
        token_BGT=torch.arange(target_BGT.shape[-1]) < lengths_BG.unsqueeze(-1),
        query_BG=torch.tensor([row.queries for row in rows]),
    )


@dataclass
class _PackedRow:
    """A row under construction.

    ids, segment, shift       By token: its id, the CoT it belongs to (0 is the prompt), and
                              by how much its index exceeds that in a sequence of its own.
    before, targets, queries  By CoT, see `Packed`.
    """

    ids: list[int]
    segment: list[int]
    shift: list[int]
    before: list[list[int]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)


def _pack_row(
    model: DeScore, prompt_ids: Sequence[int], cots: Sequence[PackedCot]
) -> _PackedRow:
    prompt_length = len(prompt_ids)
    row = _PackedRow(list(prompt_ids), [0] * prompt_length, [0] * prompt_length)
    for number, cot in enumerate(cots, 1):
        # The CoT and its query.
        first = len(row.ids)
        length = len(cot.ids) + len(model.query_ids)
        row.ids += [*cot.ids, *model.query_ids]
        row.segment += [number] * length
        row.shift += [first - prompt_length] * length
        row.queries.append(len(row.ids) - 1)

        # The prompt's last token predicts the first token of every CoT.
        targets = list(cot.ids)
        if cot.finished:
            targets.append(model.end_id)
        before = [prompt_length - 1, *range(first, first + len(cot.ids))]
        row.targets.append(targets)
        row.before.append(before[: len(targets)])
    return row


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Long tensor of rows, padded on the right to the longest."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
