"""Measure a token of a chain of thought (CoT) on preallocated buffers and on DynamicCache.

    python experiments/bench/rm_decode.py

Two loops write CoTs of the same length, with the same tokens:

    dynamic   transformers' DynamicCache, which copies the whole cache for every token, and the
              masks that transformers makes of a mask of two dimensions
    buffers   `rm.generate`

Milliseconds a token are medians of alternating rounds, in fp32, without the forward of the
prompts: of the processor (``ratio`` is theirs) and by the clock, which counts what else the
machine does. Short CoTs are written more often. CoTs never end by themselves here.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from experiments.bench.bench_io import bench_parser, write_record
from launch.compose import quiet
from rm.config import Generation
from rm.generate import _read_prompts, _TokenSampler, _write
from rm.model import Batch, DeScore
from rm.packed import PackedCot
from rm.video import prepare
from toy.world import FPS, caption, random_scenes, render


@torch.no_grad()
def write_with_dynamic_cache(
    model: DeScore,
    batch: Batch,
    how: Generation,
    seeds: Sequence[int] | None,
    copies: int,
    on_prompts: Callable[[], None] = lambda: None,
) -> list[PackedCot]:
    """Write CoTs as `rm.generate.generate` does, on a DynamicCache.

    ``on_prompts`` is called after the forward of the prompts.
    """
    from transformers import DynamicCache

    # 1. The prompts.
    cache = DynamicCache(config=model.backbone.config.text_config)
    row_B = torch.arange(len(batch.ids_BL))
    hidden_BLD = model.hidden(
        batch,
        past_key_values=cache,
        use_cache=True,
    )
    last_BD = hidden_BLD[row_B, batch.last_B]
    position_B = batch.position_3BL[0, row_B, batch.last_B]

    # A copy of everything for every CoT.
    cache.batch_repeat_interleave(copies)
    hidden_BD = last_BD.repeat_interleave(copies, 0)
    position_B = position_B.repeat_interleave(copies, 0)
    ids_BL = batch.ids_BL.repeat_interleave(copies, 0)
    mask_BK = batch.mask_BL.bool()
    mask_BK = mask_BK.repeat_interleave(copies, 0)
    on_prompts()

    # 2. Token by token, until all rows have ended.
    sampler = _TokenSampler(model, ids_BL, how, seeds)
    alive_B = torch.ones(len(ids_BL), dtype=torch.bool)
    lengths_B = torch.zeros(len(ids_BL), dtype=torch.long)
    columns = []
    for step in range(how.max_new_tokens):
        logits_BV = model.backbone.lm_head(hidden_BD).float()
        chosen_B = sampler(logits_BV, torch.tensor([step]))
        alive_B = alive_B & (chosen_B != model.end_id)
        if not alive_B.any():
            break

        # Feed the tokens; the rows that have ended do not see their pad id.
        token_B = torch.where(alive_B, chosen_B, model.pad_id)
        columns.append(token_B)
        lengths_B += alive_B
        position_B = position_B + 1
        mask_BK = torch.cat([mask_BK, alive_B.unsqueeze(1)], 1)
        output = model.backbone.model.language_model(
            input_ids=token_B.unsqueeze(1),
            position_ids=position_B.view(1, -1, 1).expand(3, -1, -1),
            attention_mask=mask_BK,
            past_key_values=cache,
            use_cache=True,
        )
        hidden_BD = output.last_hidden_state[:, 0]

    # 3. The ids of each row.
    cots = []
    lengths = lengths_B.tolist()
    for row, length in enumerate(lengths):
        ids = [int(column[row]) for column in columns[:length]]
        cots.append(PackedCot(tuple(ids), not bool(alive_B[row])))
    return cots


def make_batch(model: DeScore, videos: int) -> Batch:
    """Render and encode videos of the embedded world."""
    scenes = random_scenes(videos, random.Random(0))
    prepared = []
    encoded = []
    for scene, frames in zip(scenes, render(scenes, frames=8), strict=True):
        video = prepare(frames, model.settings, fps=FPS)
        prepared.append(video)
        encoded.append(model.encode(caption(scene.attributes, wording=0), video))
    return model.batch(encoded, prepared, query=False)


@dataclass(frozen=True)
class Timed:
    """CoTs, and the seconds of their loop: of the processor, and by the clock."""

    cots: list[PackedCot]
    processor: float
    clock: float


def now() -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    return time.process_time(), time.perf_counter()


def timed(cots: list[PackedCot], start: tuple[float, float]) -> Timed:
    """The seconds since ``start``."""
    processor, clock = now()
    return Timed(cots, processor - start[0], clock - start[1])


def time_dynamic(model: DeScore, batch: Batch, how: Generation) -> Timed:
    """Time the decode loop on DynamicCache."""
    times = []

    def on_prompts() -> None:
        times.append(now())

    cots = write_with_dynamic_cache(
        model,
        batch,
        how,
        range(len(batch.ids_BL)),
        1,
        on_prompts,
    )
    return timed(cots, times[0])


def time_buffers(model: DeScore, batch: Batch, how: Generation) -> Timed:
    """Time the decode loop of `rm.generate`."""
    seeds = range(len(batch.ids_BL))
    with torch.no_grad():
        prompts = _read_prompts(model, batch, 1)
        start = now()
        written = _write(model, prompts, how, seeds)
    cots = [written.cot(row) for row in seeds]
    return timed(cots, start)


def measure(model: DeScore, batch: Batch, tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds a token of both loops, and their ratio.

    Raises RuntimeError if the loops write different tokens.
    """
    how = Generation(
        max_new_tokens=tokens,
        temperature=1.0,
        repetition_penalty=1.0,
    )
    runs: dict[str, list[Timed]] = {"dynamic": [], "buffers": []}

    # The loops in turn.
    for _ in range(rounds):
        runs["dynamic"].append(time_dynamic(model, batch, how))
        runs["buffers"].append(time_buffers(model, batch, how))

        # A comparison of two different things would be worth nothing.
        cots = runs["buffers"][-1].cots
        if cots != runs["dynamic"][-1].cots:
            raise RuntimeError(f"the tokens of the two loops differ at {tokens} tokens")
        if min(len(cot.ids) for cot in cots) < tokens:
            raise RuntimeError("a chain of thought ended by itself")

    # Medians over the rounds.
    result = {}
    for name, loops in runs.items():
        processor = statistics.median(loop.processor for loop in loops)
        clock = statistics.median(loop.clock for loop in loops)
        result[name] = 1000 * processor / tokens
        result[f"{name}_clock"] = 1000 * clock / tokens
    for clock in ("", "_clock"):
        dynamic = result[f"dynamic{clock}"]
        buffers = result[f"buffers{clock}"]
        result[f"ratio{clock}"] = buffers / dynamic
    return result


def main() -> None:
    """Time both loops at several lengths and write the JSON."""
    parser = bench_parser(__doc__, "rm_decode")
    parser.add_argument("--base", default="assets/shapes/qwen")
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet()
    model = DeScore.from_base(args.base).eval()

    # An id that is never sampled: all CoTs have the same length.
    model.end_id = model.query_id
    batch = make_batch(model, args.videos)

    # The first run of anything is slow.
    measure(model, batch, 8, 1)

    # Every length.
    table = {}
    for tokens in args.tokens:
        rounds = args.rounds * max(1, 256 // tokens)
        table[str(tokens)] = measure(model, batch, tokens, rounds)
    record = {
        "videos": args.videos,
        "prompt_tokens": batch.ids_BL.shape[1],
        "ms_per_token": table,
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
