"""Several chains of thought about one video in one sequence: the prompt and the video are computed once.

A row is ``[chat, video][CoT_1 <Reward>][CoT_2 <Reward>] ... [CoT_G <Reward>]`` under a mask that lets a chain see the
prompt and itself only, with M-RoPE positions that go on after the prompt in every chain. So each chain gets what it
would get alone, hidden states and gradients (tests/rm/test_packed.py), and one forward serves both objectives: the
log-probabilities of its tokens, and the reward at its query. Causal attention makes the two independent: the query is
last and changes no hidden state before it.

The mask is four-dimensional, which torch's own attention ("sdpa", "eager") takes and FlashAttention does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.distributed import max_over_ranks
from rm.model import Batch, DeScore, rope_positions
from rm.prompt import Encoded
from rm.video import PreparedVideo

_TOKENS_AT_ONCE = 1024  # logits of a large vocabulary are the largest tensors of a step


@dataclass(frozen=True)
class PackedCot:
    """A sampled chain of thought: token ids without end-of-turn, and whether it ended by itself."""

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Packed:
    """Rows of equally many chains. T is the longest chain and its end token, padded.

    batch        as `DeScore.hidden` takes it; ``mask_BL`` is bool (B, 1, L, L)
    before_BGT   the place whose hidden state predicts token t (of the first: the prompt's last place)
    target_BGT   the tokens, the end-of-turn token last if the chain finished
    token_BGT    bool, which of them exist
    query_BG     the place of each chain's last query token
    """

    batch: Batch
    before_BGT: Tensor
    target_BGT: Tensor
    token_BGT: Tensor
    query_BG: Tensor

    def to(self, device: torch.device | str) -> Packed:
        return replace(
            self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)}
        )


@dataclass(frozen=True)
class PackedOutput:
    """log_prob_BGT  of every token, 0 where there is none; reward_BGK."""

    log_prob_BGT: Tensor
    reward_BGK: Tensor


def pack(
    model: DeScore,
    encoded: Sequence[Encoded],
    videos: Sequence[PreparedVideo],
    chains: Sequence[Sequence[PackedCot]],
) -> Packed:
    """One row a video; ``chains[b]`` are the G chains of video b, whose prompt is ``encoded[b].prompt_ids``.

    Raises ValueError when rows have unequal numbers of chains.
    """
    size = len(chains[0]) if chains else 0
    if (
        not size
        or any(len(row) != size for row in chains)
        or not len(encoded) == len(videos) == len(chains)
    ):
        raise ValueError(
            f"pack: {len(encoded)} prompts, {len(videos)} videos, chains {[len(row) for row in chains]}"
        )
    rows = [_row(model, item, own) for item, own in zip(encoded, chains, strict=True)]
    ids_BL = _padded([row.ids for row in rows], model.pad_id)
    part_BL = _padded([row.part for row in rows], -1)
    shift_BL = _padded([row.shift for row in rows], 0)
    length = ids_BL.shape[1]
    place_L = torch.arange(length)
    same_BLL = part_BL[:, :, None] == part_BL[:, None, :]
    visible_BLL = (same_BLL | (part_BL[:, None, :] == 0)) & (
        place_L[:, None] >= place_L[None, :]
    )
    grid_B3 = torch.tensor([video.grid for video in videos])
    position_3BL = rope_positions(
        ids_BL == model.video_pad_id, grid_B3, model.settings.merge_size
    )
    batch = Batch(
        ids_BL=ids_BL,
        mask_BL=visible_BLL.unsqueeze(1),
        position_3BL=position_3BL - shift_BL,
        last_B=torch.tensor([len(row.ids) - 1 for row in rows]),
        patches=torch.cat([video.patches for video in videos]),
        grid_B3=grid_B3,
    )
    longest = max(len(target) for row in rows for target in row.targets)
    return Packed(
        batch=batch,
        before_BGT=torch.stack([_padded(row.before, 0, longest) for row in rows]),
        target_BGT=torch.stack([_padded(row.targets, 0, longest) for row in rows]),
        token_BGT=torch.stack(
            [_padded([[1] * len(t) for t in row.targets], 0, longest) for row in rows]
        ).bool(),
        query_BG=torch.tensor([row.queries for row in rows]),
    )


def packed_forward(
    model: DeScore, packed: Packed, *, temperature: float, score: bool = True
) -> PackedOutput:
    """Log-probabilities under the sampler's distribution, and rewards; ONE forward of the backbone.

        log_prob_t = log softmax(logits_t / temperature)[token_t],   over the ids that may be sampled

    ``score=False`` leaves the rewards at 0: the reference of the KL has none.
    """
    hidden_BLD = model.hidden(packed.batch)
    row_B1 = torch.arange(len(hidden_BLD), device=hidden_BLD.device).view(-1, 1)
    where = packed.token_BGT
    row_BGT = row_B1.unsqueeze(-1).expand_as(where)
    hidden_ND = hidden_BLD[row_BGT[where], packed.before_BGT[where]]
    log_prob_N = token_log_probs(
        model, hidden_ND, packed.target_BGT[where], temperature=temperature
    )
    log_prob_BGT = torch.zeros(where.shape, device=hidden_BLD.device).masked_scatter(
        where, log_prob_N
    )
    query_BGK = packed.query_BG.unsqueeze(-1) - model.steps_back
    if not score:
        return PackedOutput(
            log_prob_BGT, torch.zeros(query_BGK.shape, device=hidden_BLD.device)
        )
    return PackedOutput(
        log_prob_BGT, model.read_reward(hidden_BLD[row_B1.unsqueeze(-1), query_BGK])
    )


def token_log_probs(
    model: DeScore, hidden_ND: Tensor, target_N: Tensor, *, temperature: float
) -> Tensor:
    """(N,) fp32. Logits are made for a part of the tokens at a time, and again in the backward.

    Of a sharded model in equally many parts on every rank, empty ones too: each gathers the vocabulary head.
    """
    banned_V = model.banned_ids().to(hidden_ND.device)

    def part(hidden: Tensor, target: Tensor) -> Tensor:
        logits = (
            model.backbone.lm_head(hidden).float().masked_fill(banned_V, -torch.inf)
            / temperature
        )
        return -F.cross_entropy(logits, target, reduction="none")

    count = max(1, -(-len(hidden_ND) // _TOKENS_AT_ONCE))
    if model.sharded:
        count = int(max_over_ranks(count))
    parts = [
        slice(i * _TOKENS_AT_ONCE, (i + 1) * _TOKENS_AT_ONCE) for i in range(count)
    ]
    if not torch.is_grad_enabled() or count == 1:
        return torch.cat([part(hidden_ND[i], target_N[i]) for i in parts])
    return torch.cat(
        [
            checkpoint(part, hidden_ND[i], target_N[i], use_reentrant=False)
            for i in parts
        ]
    )


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    part: list[int]  # 0 the prompt, g the g-th chain
    shift: list[int]  # how far the place is ahead of the place it would have alone
    before: list[list[int]]
    targets: list[list[int]]
    queries: list[int]


def _row(model: DeScore, encoded: Encoded, chains: Sequence[PackedCot]) -> _Row:
    start = len(encoded.prompt_ids)
    row = _Row(list(encoded.prompt_ids), [0] * start, [0] * start, [], [], [])
    for number, chain in enumerate(chains, 1):
        first, size = len(row.ids), len(chain.ids)
        row.ids.extend((*chain.ids, *model.query_ids))
        row.part.extend([number] * (len(row.ids) - first))
        row.shift.extend([first - start] * (len(row.ids) - first))
        targets = [*chain.ids, *([model.end_id] if chain.finished else [])]
        row.targets.append(targets)
        row.before.append([start - 1, *range(first, first + size)][: len(targets)])
        row.queries.append(len(row.ids) - 1)
    return row


def _padded(
    rows: Sequence[Sequence[int]], value: int, length: int | None = None
) -> Tensor:
    """long (rows, the longest), padded on the right."""
    width = max(map(len, rows)) if length is None else length
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
