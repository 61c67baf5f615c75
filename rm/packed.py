"""The forward of stage 2: several chains of thought (CoTs) about a video in one sequence.

A row is ``[chat, video][CoT_1 <Reward>][CoT_2 <Reward>] ... [CoT_G <Reward>]``. The attention
mask lets a CoT see the prompt and itself only, and the M-RoPE positions of every CoT continue
after the prompt. So each CoT gets the hidden states and gradients of a sequence of its own,
while prompt and video are computed once. The same forward gives the log-probabilities of the
CoT's tokens and the reward at its query: the query is last, so causal attention keeps it from
changing any hidden state before it.

The mask is four-dimensional; torch's attention ("sdpa", "eager") takes it, FlashAttention
does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.distributed import max_over_ranks
from rm.model import Batch, DeScore, rope_positions
from rm.prompt import Encoded
from rm.video import PreparedVideo

# The logits of a large vocabulary are the largest tensors of a step: compute so many at a time.
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackedCot:
    """A sampled CoT: its token ids without end-of-turn, and whether it ended by itself."""

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Packed:
    """Rows of G CoTs each. T is the longest CoT with its end token; shorter ones are padded.

    batch       The input of `DeScore.hidden`; its ``mask_BL`` is bool (B, 1, L, L).
    before_BGT  The index of the hidden state that predicts token t.
    target_BGT  The token ids, with the end-of-turn token last if the CoT finished.
    token_BGT   bool, True where there is a token.
    query_BG    The index of the last query token of each CoT.
    """

    batch: Batch
    before_BGT: Tensor
    target_BGT: Tensor
    token_BGT: Tensor
    query_BG: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """Move every tensor to a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedOutput:
    """Log-probabilities (B, G, T), 0 where there is no token, and rewards (B, G, K)."""

    log_prob_BGT: Tensor
    reward_BGK: Tensor


def packed_forward(
    model: DeScore, packed: Packed, *, temperature: float, score: bool = True
) -> PackedOutput:
    """Compute log-probabilities and rewards of all CoTs in one forward of the backbone.

        log_prob_t = log softmax(logits_t / temperature)[token_t]

    over the ids that may be sampled. ``score=False`` leaves the rewards at 0, which is all
    that the reference policy of the KL term needs.
    """
    hidden_BLD = model.hidden(packed.batch)
    device = hidden_BLD.device
    row_B1 = torch.arange(len(hidden_BLD), device=device).view(-1, 1)
    row_B11 = row_B1.unsqueeze(-1)

    # Log-probabilities: gather the N hidden states that predict a token.
    token_BGT = packed.token_BGT
    row_N = row_B11.expand_as(token_BGT)[token_BGT]
    hidden_ND = hidden_BLD[row_N, packed.before_BGT[token_BGT]]
    target_N = packed.target_BGT[token_BGT]
    log_prob_N = token_log_probs(model, hidden_ND, target_N, temperature=temperature)
    zero_BGT = torch.zeros(token_BGT.shape, device=device)
    log_prob_BGT = zero_BGT.masked_scatter(token_BGT, log_prob_N)

    # Rewards: the linear head on the hidden states of the query tokens.
    query_BGK = packed.query_BG.unsqueeze(-1) - model.query_offset_K
    if not score:
        return PackedOutput(log_prob_BGT, torch.zeros(query_BGK.shape, device=device))
    reward_BGK = model.reward_from_hidden(hidden_BLD[row_B11, query_BGK])
    return PackedOutput(log_prob_BGT, reward_BGK)


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

    count = max(1, math.ceil(len(hidden_ND) / _TOKENS_AT_ONCE))
    if model.sharded:
        count = int(max_over_ranks(count))
    keep_logits = not torch.is_grad_enabled() or count == 1
    parts = []
    for i in range(count):
        part = slice(i * _TOKENS_AT_ONCE, (i + 1) * _TOKENS_AT_ONCE)
        inputs = (hidden_ND[part], target_N[part])
        if keep_logits:
            parts.append(log_probs(*inputs))
        else:
            parts.append(checkpoint(log_probs, *inputs, use_reentrant=False))
    return torch.cat(parts)


def pack(
    model: DeScore,
    encoded: Sequence[Encoded],
    videos: Sequence[PreparedVideo],
    cots: Sequence[Sequence[PackedCot]],
) -> Packed:
    """Pack the G CoTs ``cots[b]`` behind the prompt ``encoded[b].prompt_ids``, for every row b.

    Raises ValueError if rows have unequal numbers of CoTs.
    """
    sizes = [len(group) for group in cots]
    same_length = len(encoded) == len(videos) == len(cots)
    if not same_length or len(set(sizes)) != 1 or sizes[0] == 0:
        raise ValueError(
            f"pack: {len(encoded)} prompts, {len(videos)} videos, CoTs {sizes}"
        )
    rows = [
        _pack_row(model, item.prompt_ids, group)
        for item, group in zip(encoded, cots, strict=True)
    ]
    ids_BL = _padded([row.ids for row in rows], model.pad_id)

    # A token sees its own CoT and the prompt (segment 0), causally.
    segment_BL = _padded([row.segment for row in rows], -1)
    index_L = torch.arange(ids_BL.shape[1])
    causal_LL = index_L[:, None] >= index_L[None, :]
    same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
    prompt_BLL = segment_BL[:, None, :] == 0
    visible_BLL = (same_BLL | prompt_BLL) & causal_LL

    # Every CoT continues at the position after the prompt.
    grid_B3 = torch.tensor([video.grid for video in videos])
    position_3BL = rope_positions(
        ids_BL == model.video_pad_id, grid_B3, model.settings.merge_size
    )
    shift_BL = _padded([row.shift for row in rows], 0)

    batch = Batch(
        ids_BL=ids_BL,
        mask_BL=visible_BLL.unsqueeze(1),
        position_3BL=position_3BL - shift_BL,
        last_B=torch.tensor([len(row.ids) - 1 for row in rows]),
        patches=torch.cat([video.patches for video in videos]),
        grid_B3=grid_B3,
    )
    longest = max(len(target) for row in rows for target in row.targets)
    exists = [[[1] * len(target) for target in row.targets] for row in rows]
    return Packed(
        batch=batch,
        before_BGT=torch.stack([_padded(row.before, 0, longest) for row in rows]),
        target_BGT=torch.stack([_padded(row.targets, 0, longest) for row in rows]),
        token_BGT=torch.stack([_padded(row, 0, longest) for row in exists]).bool(),
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


def _padded(
    rows: Sequence[Sequence[int]], value: int, length: int | None = None
) -> Tensor:
    """Long tensor (rows, length) padded on the right; by default to the longest row."""
    if length is None:
        length = max(len(row) for row in rows)
    padded = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(padded)
